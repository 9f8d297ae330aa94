// One sample: its tokens as text, and a map of layers and tokens, coloured by a quantity.

import { useMemo, useState } from "preact/hooks";
import { amounts, css, inkOn, scaled } from "./colours.js";
import { Heat, savePng, saveSvg } from "./heat.jsx";
import { changes, cosines, entropies, lookbacks, norms, sinkMasses, usualRange } from "./numbers.js";
import { Choice, Facts, Legend, Loaded, Text, short, useLoaded, visible } from "./parts.jsx";

const TEXTS = ["question", "generated_text", "generated_answer", "generated_answer_clean"];
// Of a kind: what is computed of the arrays of all its layers, a row of tokens for each.
export const QUANTITIES = {
  norm: { title: "norm of the state", kind: "hidden_states", row: (layer) => norms(layer) },
  change: { title: "norm of the change", kind: "hidden_states", row: (layer, before) => (before ? changes(layer, before) : null) },
  "cosine-before": { title: "cosine with the layer before", kind: "hidden_states", row: (layer, before) => (before ? cosines(layer, before) : null) },
  "cosine-last": { title: "cosine with the last layer", kind: "hidden_states", row: (layer, _, last) => cosines(layer, last) },
  entropy: { title: "entropy of attention (nats)", kind: "attentions", row: (layer) => entropies(layer) },
  sink: { title: "attention to the first token", kind: "attentions", row: (layer) => sinkMasses(layer) },
  lookback: { title: "lookback ratio", kind: "attentions", row: (layer, _before, _last, sample) => lookbacks(layer, sample.attrs.prompt_len ?? 0) },
};

export const kindOf = (sample, kind) => (kind === "attentions" && !sample.layers(kind).length ? "attention_mean" : kind);

// A quantity of all layers: {rows, columns, values, layers}; read layer by layer, so that long
// samples need little memory.
export async function quantityMatrix(sample, name) {
  const { kind: wanted, row } = QUANTITIES[name];
  const kind = kindOf(sample, wanted);
  const layers = sample.layers(kind);
  const names = layers.map((each) => each.name);
  const last = name === "cosine-last" ? (await sample.decodedLayers(kind, names.slice(-1)))[0] : null;
  let before = null;
  const found = [];
  const group = kind === "hidden_states" ? 8 : 1;
  for (let start = 0; start < names.length; start += group) {
    for (const layer of await sample.decodedLayers(kind, names.slice(start, start + group))) {
      const tokens = layer.shape.at(kind === "hidden_states" ? 0 : -2);
      found.push(row(layer, before, last, sample) ?? new Float32Array(tokens).fill(NaN));
      before = layer;
    }
  }
  const columns = found[0]?.length ?? 0;
  const values = new Float32Array(found.length * columns);
  found.forEach((each, number) => values.set(each, number * columns));
  return { rows: found.length, columns, values, layers };
}

export async function tokensOf(sample) {
  if (sample.has("tokens_decoded")) return sample.texts("tokens_decoded");
  if (sample.has("tokens")) return Array.from((await sample.arrays(["tokens"]))[0].values, (id) => `[${id}]`);
  return Array.from({ length: sample.attrs.seq_len }, (_, number) => `[${number}]`);
}

export function SampleView({ sample, place, go }) {
  const texts = useLoaded(async () => {
    const names = TEXTS.filter((name) => sample.has(name));
    const found = await sample.arrays(names);
    return Object.fromEntries(names.map((name, at) => [name, found[at].values[0] ?? ""]));
  }, [sample]);
  const tokens = useLoaded(() => tokensOf(sample), [sample]);
  const options = Object.entries(QUANTITIES).filter(([, each]) => sample.layers(kindOf(sample, each.kind)).length);
  const quantity = options.some(([key]) => key === place.quantity) ? place.quantity : options[0]?.[0];
  const matrix = useLoaded(() => (quantity ? quantityMatrix(sample, quantity) : null), [sample, quantity]);
  const { attrs } = sample;
  return (
    <>
      <Facts of={{
        id: sample.id, label: attrs.label, length: attrs.seq_len, prompt: attrs.prompt_len, coverage: attrs.coverage,
        scores: Object.entries(sample.scores).map(([name, value]) => `${name} ${short(value)}`).join(", "),
      }} />
      <Loaded state={texts}>{(found) => <Facts of={found} />}</Loaded>
      {attrs.coverage !== "full" ? <p class="note">The arrays do not cover exactly the stored tokens: coverage is “{attrs.coverage}”.</p> : null}
      {quantity ? (
        <div class="bar-of-controls">
          <Choice label="quantity" value={quantity} options={options.map(([key, each]) => [key, each.title])} onChange={(value) => go({ quantity: value }, false)} />
          <a href="#" onClick={(event) => { event.preventDefault(); go({ view: "attention" }); }}>attention</a>
          <a href="#" onClick={(event) => { event.preventDefault(); go({ view: "compare", otherArchive: place.archive ?? 0, otherSample: sample.number }); }}>compare</a>
        </div>
      ) : <p class="note">This sample stores no arrays.</p>}
      <Loaded state={tokens}>
        {(words) => <Loaded state={matrix}>
          {(found) => <TokenMap {...{ sample, words, matrix: found, quantity, place, go }} />}
        </Loaded>}
      </Loaded>
    </>
  );
}

function TokenMap({ sample, words, matrix, quantity, place, go }) {
  const [pointed, setPointed] = useState(null);
  const row = matrix ? Math.max(0, matrix.layers.findIndex((each) => each.layer === (place.layer === -1 ? null : place.layer))) : 0;
  const limits = useMemo(() => (matrix ? usualRange(matrix.values) : [0, 1]), [matrix]);
  const name = (number) => layerName(matrix.layers[number]);
  if (!matrix?.rows) return <Words words={words} promptLen={sample.attrs.prompt_len} />;
  const values = matrix.values.subarray(row * matrix.columns, (row + 1) * matrix.columns);
  const at = pointed ?? (place.token === undefined ? null : { row, column: place.token });
  const choose = ({ row: chosen, column }) => go({ layer: matrix.layers[chosen].layer ?? -1, token: column }, false);
  const title = `${QUANTITIES[quantity].title}, sample ${sample.number}`;
  const canvas = () => document.querySelector("[data-testid=map]");
  return (
    <>
      <Words words={words} values={values} limits={limits} promptLen={sample.attrs.prompt_len} chosen={place.token}
        onChoose={(token) => go({ token, layer: matrix.layers[row].layer ?? -1 }, false)} />
      <p class="bar-of-controls" role="status" data-testid="value">
        <Legend limits={limits} palette={amounts} />
        {at && at.column < matrix.columns ? <>{name(at.row)}, token {at.column} <code><Text>{words[at.column]}</Text></code>: {short(matrix.values[at.row * matrix.columns + at.column])}</> : "point at the map"}
        <button onClick={() => savePng(canvas(), title)}>PNG</button>
        <button onClick={() => saveSvg(canvas(), title, { title, rows: "layer", columns: "token" })}>SVG</button>
      </p>
      <div class="with-axis">
        <ol class="layers">{matrix.layers.map((each, number) => <li class={number === row ? "chosen" : ""}>{matrix.rows <= 40 || number % 8 === 0 ? layerName(each) : ""}</li>)}</ol>
        <Heat testId="map" matrix={matrix} limits={limits} height={Math.max(120, Math.min(640, matrix.rows * 16))} label={title}
          chosen={place.token === undefined ? null : { row, column: place.token }} onPoint={setPointed} onChoose={choose} />
      </div>
    </>
  );
}

export const layerName = ({ layer, name }) => (layer === null ? "embedding" : name.replace(/_0*(?=\d)/, " "));

// Tokens as the text they make; prompt and answer are told apart.
export function Words({ words, values, limits, palette = amounts, promptLen, chosen, onChoose, isSquareRoot }) {
  const place = values ? scaled(limits, isSquareRoot) : () => null;
  const MOST = 5000;
  return (
    <p class="words" data-testid="words">
      {words.slice(0, MOST).map((word, number) => {
        const found = values && number < values.length ? place(values[number]) : null;
        const style = found === null ? {} : { background: css(palette[found]), color: inkOn(palette[found]) };
        const classes = [promptLen > number ? "prompt" : "answer", chosen === number ? "chosen" : ""].join(" ");
        return (
          <span key={number} style={style} class={classes} onClick={() => onChoose?.(number)}
            title={`${number}${values && number < values.length ? `: ${short(values[number])}` : ""}`}>
            <bdi>{visible(word.length > 200 ? `${word.slice(0, 200)}…` : word).replace(/\n/g, "⏎\n")}</bdi>
          </span>
        );
      })}
      {words.length > MOST ? <span class="note"> and {words.length - MOST} more tokens</span> : null}
    </p>
  );
}
