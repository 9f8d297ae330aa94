// Attention of one layer: a grid of heads, one head large, and what a token looks at.

import { useEffect, useMemo, useState } from "preact/hooks";
import { amounts } from "./colours.js";
import { Heat, Saves, Thumbnail } from "./heat.jsx";
import { range, weightRange } from "./numbers.js";
import { Choice, Legend, Loaded, Problem, Text, short, useLoaded } from "./parts.jsx";
import { kindOf, layerName, tokensOf } from "./quantities.js";
import { Words } from "./words.jsx";

// Weights of a layer beyond which its heads are not read unasked.
const UNASKED_VALUES = 64 * 1024 * 1024;
const THUMBNAIL = 96;

export const asMatrix = ({ shape, values }) => ({ rows: shape.at(-2), columns: shape.at(-1), values });

// One head (query, key) of a layer; only the chunks that hold it are read. "mean" is over all heads.
export async function headOf(sample, kind, name, head) {
  const shape = sample.shape(kind, name);
  if (shape.length === 2) return (await sample.decodedLayers(kind, [name]))[0];
  if (head === "mean") {
    const sum = new Float32Array(shape[1] * shape[2]);
    for (let number = 0; number < shape[0]; number += 1) {
      const [{ values }] = await sample.decodedLayers(kind, [name], [number, number + 1]);
      for (let at = 0; at < sum.length; at += 1) sum[at] += values[at];
    }
    for (let at = 0; at < sum.length; at += 1) sum[at] /= shape[0];
    return { shape: shape.slice(1), values: sum };
  }
  const [{ values }] = await sample.decodedLayers(kind, [name], [head, head + 1]);
  return { shape: shape.slice(1), values };
}

export function AttentionView({ sample, place, go }) {
  const kind = kindOf(sample, "attentions");
  const layers = sample.layers(kind);
  if (!layers.length) {
    return <p class="note">{sample.layers("queries").length
      ? "This sample stores queries and keys, but not the rule by which attention follows from them (the attribute “mask”). Extract it again with eager attention to see weights."
      : "This sample stores no attentions."}</p>;
  }
  const layer = layers.find((each) => each.layer === place.layer) ?? layers[0];
  const shape = sample.shape(kind, layer.name);
  const numHeads = shape.length === 3 ? shape[0] : 0;
  const head = numHeads ? (Number.isInteger(place.head) && place.head < numHeads ? place.head : place.head === "mean" ? "mean" : 0) : "mean";
  const tokens = useLoaded(() => tokensOf(sample), [sample]);
  const weights = useLoaded(() => headOf(sample, kind, layer.name, head), [sample, layer.name, head]);
  const step = (changes) => go(changes, false);
  useKeys({
    "[": () => step({ layer: layers[Math.max(0, layers.indexOf(layer) - 1)].layer }),
    "]": () => step({ layer: layers[Math.min(layers.length - 1, layers.indexOf(layer) + 1)].layer }),
    ",": () => Number.isInteger(head) && step({ head: Math.max(0, head - 1) }),
    ".": () => Number.isInteger(head) && step({ head: Math.min(numHeads - 1, head + 1) }),
  });
  return (
    <>
      <div class="bar-of-controls">
        <Choice label="layer" value={String(layer.layer)} options={layers.map((each) => [String(each.layer), layerName(each)])}
          onChange={(value) => step({ layer: Number(value) })} />
        {numHeads ? <Choice label="head" value={String(head)} options={[["mean", "mean of heads"], ...Array.from({ length: numHeads }, (_, number) => [String(number), `head ${number}`])]}
          onChange={(value) => step({ head: value === "mean" ? value : Number(value) })} /> : <span>mean of heads is stored</span>}
        <span class="note">keys: [ ] layer, , . head; wheel zooms, double click shows all</span>
      </div>
      {numHeads ? <Grid {...{ sample, kind, layer, numHeads, head, onChoose: (number) => step({ head: number }) }} /> : null}
      <Loaded state={tokens}>
        {(words) => <Loaded state={weights}>
          {(found) => <Head key={sample.number} {...{ sample, words, weights: found, layer, head, place, step }} />}
        </Loaded>}
      </Loaded>
    </>
  );
}

// Small pictures of all heads; of long samples only when asked for.
function Grid({ sample, kind, layer, numHeads, head, onChoose }) {
  const [isAsked, setAsked] = useState(false);
  const shape = sample.shape(kind, layer.name);
  const isShown = isAsked || shape.reduce((product, each) => product * each, 1) <= UNASKED_VALUES;
  const state = useLoaded(async () => (isShown ? { name: layer.name, pictures: await sample.thumbnails(kind, layer.name, THUMBNAIL) } : null), [sample, kind, layer.name, isShown]);
  if (state.error) return <Problem error={state.error} />;
  if (!isShown) return <p><button onClick={() => setAsked(true)}>show all {numHeads} heads of this long sample</button></p>;
  return (
    <div class="grid" data-testid="heads" data-drawn={state.value?.name}>
      {Array.from({ length: numHeads }, (_, number) => (
        <Thumbnail key={number} label={`head ${number}`} matrix={(state.value ?? state.stale)?.pictures[number]} isChosen={number === head} onChoose={() => onChoose(number)} />
      ))}
    </div>
  );
}

function Head({ sample, words, weights, layer, head, place, step }) {
  const [pointed, setPointed] = useState(null);
  const [threshold, setThreshold] = useState(0);
  const [hidesFirst, setHidesFirst] = useState(false);
  const matrix = useMemo(() => (hidesFirst ? withoutFirst(asMatrix(weights)) : asMatrix(weights)), [weights, hidesFirst]);
  const limits = useMemo(() => weightRange(matrix), [matrix]);
  const [numQueries, numKeys] = weights.shape;
  const token = Math.min(place.token ?? pointed?.row ?? numQueries - 1, numQueries - 1);
  const looksAt = weights.values.subarray(token * numKeys, (token + 1) * numKeys);
  const lookedAt = useMemo(() => Float32Array.from({ length: numQueries }, (_, query) => (query < token ? NaN : weights.values[query * numKeys + token])), [weights, token]);
  const numEdges = useMemo(() => {
    let count = 0;
    for (let query = 0; query < numQueries; query += 1) {
      for (let key = 0; key <= query + numKeys - numQueries; key += 1) count += weights.values[query * numKeys + key] > threshold;
    }
    return count;
  }, [weights, threshold]);
  const title = `attention of ${layerName(layer)}, ${head === "mean" ? "mean of heads" : `head ${head}`}, sample ${sample.number}`;
  return (
    <div class="two">
      <div>
        <p class="bar-of-controls">
          <Legend limits={limits} palette={amounts} isSquareRoot />
          <label>threshold <input type="range" min="0" max="0.5" step="0.005" value={threshold} aria-label="threshold"
            onInput={(event) => setThreshold(Number(event.currentTarget.value))} /> {threshold.toFixed(3)}: {numEdges} edges</label>
          <label><input type="checkbox" checked={hidesFirst} onChange={(event) => setHidesFirst(event.currentTarget.checked)} /> without the first key</label>
          <Saves of="head" title={title} rows="query" columns="key" />
        </p>
        <Heat testId="head" matrix={matrix} limits={limits} threshold={threshold} isSquareRoot height={560} label={title} onPoint={setPointed}
          chosen={pointed && { row: pointed.row, column: pointed.column }} onChoose={({ row }) => step({ token: row })} />
        <p role="status" data-testid="value">
          {pointed ? <>query {pointed.row} <code><Text>{words[pointed.row]}</Text></code> looks at key {pointed.column} <code><Text>{words[pointed.column]}</Text></code>: {short(weights.values[pointed.row * numKeys + pointed.column])}</> : "point at the picture"}
        </p>
      </div>
      <div>
        <h3>What token {token} looks at</h3>
        <Words words={words} values={looksAt} limits={[0, Math.max(1e-6, range(looksAt)[1])]} isSquareRoot chosen={token} onChoose={(number) => step({ token: number })} />
        <h3>What looks at token {token}</h3>
        <Words words={words} values={lookedAt} limits={[0, Math.max(1e-6, range(lookedAt)[1])]} isSquareRoot chosen={token} onChoose={(number) => step({ token: number })} />
      </div>
    </div>
  );
}

function withoutFirst(matrix) {
  const values = matrix.values.slice();
  for (let at = 0; at < values.length; at += matrix.columns) values[at] = 0;
  return { ...matrix, values };
}

export function useKeys(actions) {
  useEffect(() => {
    const pressed = (event) => {
      const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey;
      if (!isTyping && actions[event.key]) { event.preventDefault(); actions[event.key](); }
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  });
}
