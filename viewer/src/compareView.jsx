// Two samples, two layers, or a sample of two archives, such as an exact one and a tier of it.

import { useMemo, useState } from "preact/hooks";
import { headOf, asMatrix } from "./attentionView.jsx";
import { amounts, differences } from "./colours.js";
import { ViewError } from "./bytes.js";
import { Heat, Saves } from "./heat.jsx";
import { range, usualRange } from "./numbers.js";
import { Choice, Facts, Legend, Loaded, short, useLoaded } from "./parts.jsx";
import { kindOf, quantitiesOf } from "./quantities.js";

const OF_LAYER = { states: ["hidden_states", "states of a layer"], head: ["attentions", "one head"] };

async function shown(sample, what, layer, head, isWanted) {
  const quantity = quantitiesOf(sample)[what];
  if (quantity) return quantity.matrix(isWanted);
  if (!OF_LAYER[what] || !sample.layers(kindOf(sample, OF_LAYER[what][0])).length) {
    throw new ViewError(`${sample.archive.name}: sample ${sample.number} does not have what is compared`);
  }
  if (what === "states") {
    const name = nameOf(sample, "hidden_states", layer);
    const [{ shape, values }] = await sample.decodedLayers("hidden_states", [name]);
    return { rows: shape[0], columns: shape[1], values };
  }
  const kind = kindOf(sample, "attentions");
  return asMatrix(await headOf(sample, kind, nameOf(sample, kind, layer), head));
}

function nameOf(sample, kind, layer) {
  const layers = sample.layers(kind);
  return (layers.find((each) => (each.layer ?? -1) === layer) ?? layers.at(-1))?.name;
}

export function CompareView({ archives, sample, place, go }) {
  const whats = {
    ...Object.fromEntries(Object.entries(quantitiesOf(sample)).map(([key, { title }]) => [key, `${title}, all layers`])),
    ...Object.fromEntries(Object.entries(OF_LAYER).filter(([, [kind]]) => sample.layers(kindOf(sample, kind)).length).map(([key, [, title]]) => [key, title])),
  };
  const what = whats[place.quantity] ? place.quantity : Object.keys(whats)[0];
  const otherArchive = Math.min(place.otherArchive ?? place.archive ?? 0, archives.length - 1);
  const otherNumber = place.otherSample ?? sample.number;
  const layer = place.layer ?? 0;
  const otherLayer = place.otherLayer ?? layer;
  const head = Number.isInteger(place.head) ? place.head : 0;
  const other = useLoaded(async () => {
    const archive = await archives[otherArchive].open();
    if (!(otherNumber >= 0 && otherNumber < archive.numSamples)) throw new ViewError(`${archive.name}: has no sample ${otherNumber}; it has ${archive.numSamples}`);
    return archive.sample(otherNumber);
  }, [otherArchive, otherNumber]);
  const step = (changes) => go(changes, false);
  const number = (label, key, value) => (
    <label class="choice"><span>{label}</span><input type="number" value={value} min={key.endsWith("ayer") ? -1 : 0} onChange={(event) => step({ [key]: Number(event.currentTarget.value) })} /></label>
  );
  if (!what) return <p class="note">This sample stores no arrays.</p>;
  return (
    <>
      <div class="bar-of-controls">
        <Choice label="compare" value={what} options={Object.entries(whats)} onChange={(value) => step({ quantity: value })} />
        {!OF_LAYER[what] ? null : number("layer", "layer", layer)}
        {what === "head" ? number("head", "head", head) : null}
        <span>with</span>
        {archives.length > 1 ? <Choice label="archive" value={String(otherArchive)} options={archives.map((each, at) => [String(at), each.name])} onChange={(value) => step({ otherArchive: Number(value) })} /> : null}
        {number("sample", "otherSample", otherNumber)}
        {!OF_LAYER[what] ? null : number("its layer", "otherLayer", otherLayer)}
      </div>
      <Loaded state={other}>
        {(found) => <Both key={what} {...{ one: sample, other: found, what, layer, otherLayer, head }} />}
      </Loaded>
    </>
  );
}

function Both({ one, other, what, layer, otherLayer, head }) {
  const state = useLoaded((isWanted) => Promise.all([shown(one, what, layer, head, isWanted), shown(other, what, otherLayer, head, isWanted)]), [one, other, what, layer, otherLayer, head]);
  return <Loaded state={state}>{([first, second]) => first && second && <Pictures {...{ first, second, one, other, isSquareRoot: what === "head" }} />}</Loaded>;
}

function Pictures({ first, second, one, other, isSquareRoot }) {
  const [pointed, setPointed] = useState(null);
  const difference = useMemo(() => subtracted(first, second), [first, second]);
  const limits = useMemo(() => union(usualRange(first.values), usualRange(second.values)), [first, second]);
  const reach = useMemo(() => Math.max(1e-12, ...range(difference.values).map(Math.abs)), [difference]);
  const height = Math.max(160, Math.min(420, first.rows * 14));
  const value = (matrix) => (pointed && pointed.row < matrix.rows && pointed.column < matrix.columns ? short(matrix.values[pointed.row * matrix.columns + pointed.column]) : "–");
  const title = (sample) => `${sample.archive.name}, sample ${sample.number}`;
  return (
    <>
      <Facts of={{
        "largest difference": short(reach), "mean difference": short(meanSize(difference.values)),
        compared: `${difference.rows} × ${difference.columns}` + (first.rows === second.rows && first.columns === second.columns ? "" : `, as one is ${first.rows} × ${first.columns} and the other ${second.rows} × ${second.columns}`),
      }} />
      <p role="status" data-testid="value"><Saves of="difference" title={`${title(one)} minus ${title(other)}`} rows="row" columns="column" /> {pointed ? `row ${pointed.row}, column ${pointed.column}: ${value(first)} and ${value(second)}, difference ${value(difference)}` : "point at a picture"}</p>
      <div class="three">
        {[[first, title(one)], [second, title(other)]].map(([matrix, name]) => (
          <figure><figcaption>{name} <Legend limits={limits} palette={amounts} isSquareRoot={isSquareRoot} /></figcaption>
            <Heat matrix={matrix} limits={limits} isSquareRoot={isSquareRoot} height={height} label={name} onPoint={setPointed} /></figure>
        ))}
        <figure><figcaption>first minus second <Legend limits={[-reach, reach]} palette={differences} /></figcaption>
          <Heat testId="difference" matrix={difference} limits={[-reach, reach]} palette={differences} height={height} label="difference" onPoint={setPointed} /></figure>
      </div>
    </>
  );
}

function subtracted(first, second) {
  const [rows, columns] = [Math.min(first.rows, second.rows), Math.min(first.columns, second.columns)];
  const values = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) values[row * columns + column] = first.values[row * first.columns + column] - second.values[row * second.columns + column];
  }
  return { rows, columns, values };
}

const union = (one, other) => [Math.min(one[0], other[0]), Math.max(one[1], other[1])];

function meanSize(values) {
  let [sum, count] = [0, 0];
  for (const value of values) if (!Number.isNaN(value)) { sum += Math.abs(value); count += 1; }
  return count ? sum / count : NaN;
}
