// One sample: its tokens as text, and a map of layers and tokens, coloured by a quantity.

import { useMemo, useState } from "preact/hooks";
import { amounts } from "./colours.js";
import { Heat, Saves } from "./heat.jsx";
import { usualRange } from "./numbers.js";
import { Choice, Facts, Legend, Loaded, Text, short, useLoaded } from "./parts.jsx";
import { layerName, quantitiesOf, tokensOf } from "./quantities.js";
import { Words } from "./words.jsx";

const TEXTS = ["question", "generated_text", "generated_answer", "generated_answer_clean"];

export function SampleView({ sample, place, go }) {
  const texts = useLoaded(async () => {
    const names = TEXTS.filter((name) => sample.has(name));
    const found = await sample.arrays(names);
    return Object.fromEntries(names.map((name, at) => [name, found[at].values[0] ?? ""]));
  }, [sample]);
  const tokens = useLoaded(() => tokensOf(sample), [sample]);
  const quantities = useMemo(() => quantitiesOf(sample), [sample]);
  const options = Object.entries(quantities);
  const quantity = quantities[place.quantity] ? place.quantity : options[0]?.[0];
  const [progress, setProgress] = useState("");
  const matrix = useLoaded((isWanted) => (quantity ? quantities[quantity].matrix((text) => { if (isWanted()) setProgress(text); return isWanted(); }) : null), [sample, quantity]);
  const { attrs } = sample;
  return (
    <>
      <Facts of={{
        id: attrs.sample_id, label: sample.label, length: attrs.seq_len, prompt: attrs.prompt_len, coverage: attrs.coverage,
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
        {(words) => <Loaded state={matrix} waiting={`reading ${progress} …`}>
          {(found) => <TokenMap {...{ sample, words, matrix: found, heading: quantities[quantity]?.title, place, go }} />}
        </Loaded>}
      </Loaded>
    </>
  );
}

function TokenMap({ sample, words, matrix, heading, place, go }) {
  const [pointed, setPointed] = useState(null);
  const row = matrix ? Math.max(0, matrix.layers.findIndex((each) => each.layer === (place.layer === -1 ? null : place.layer))) : 0;
  const limits = useMemo(() => (matrix ? usualRange(matrix.values) : [0, 1]), [matrix]);
  const name = (number) => layerName(matrix.layers[number]);
  const column = matrix?.columnName ?? "token";
  if (!matrix?.rows) return <Words words={words} promptLen={sample.attrs.prompt_len} />;
  const values = matrix.values.subarray(row * matrix.columns, (row + 1) * matrix.columns);
  const at = pointed ?? (place.token === undefined ? null : { row, column: place.token });
  const choose = ({ row: chosen, column }) => go({ layer: matrix.layers[chosen].layer ?? -1, token: column }, false);
  const title = `${heading}, sample ${sample.number}`;
  return (
    <>
      <Words words={words} values={column === "token" ? values : null} limits={limits} promptLen={sample.attrs.prompt_len} chosen={place.token}
        onChoose={(token) => go({ token, layer: matrix.layers[row].layer ?? -1 }, false)} />
      <p class="bar-of-controls" role="status" data-testid="value">
        <Legend limits={limits} palette={amounts} />
        {at && at.row < matrix.rows && at.column < matrix.columns ? <>{name(at.row)}, {column} {at.column} {column === "token" ? <code><Text>{words[at.column]}</Text></code> : null}: {short(matrix.values[at.row * matrix.columns + at.column])}</> : "point at the map"}
        <Saves of="map" title={title} rows="layer" columns={column} />
      </p>
      <div class="with-axis">
        <ol class="layers">{matrix.layers.map((each, number) => <li class={number === row ? "chosen" : ""}>{matrix.rows <= 40 || number % 8 === 0 ? layerName(each) : ""}</li>)}</ol>
        <Heat testId="map" matrix={matrix} limits={limits} height={Math.max(120, Math.min(640, matrix.rows * 16))} label={title}
          chosen={place.token === undefined ? null : { row, column: place.token }} onPoint={setPointed} onChoose={choose} />
      </div>
    </>
  );
}
