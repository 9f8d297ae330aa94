// What a sample's map of layers and tokens can show: computed of states and attentions, stored in the
// archive, or of a file of features beside it.

import { RemoteFile, ViewError } from "./bytes.js";
import { changes, cosines, entropies, lookbacks, norms, projections, sinkMasses } from "./numbers.js";

// Bytes of raw values of which layers are read in one go.
const GROUP_NBYTES = 64 * 1024 * 1024;
const GROUP_WEIGHTS = 8 * 1024 * 1024;
// Features of a file that are listed one by one, of each name.
const MOST_DIRECTIONS = 16;

export const layerName = ({ layer, name }) => (layer === null ? name : name.replace(/_0*(?=\d)/, " "));

export const kindOf = (sample, kind) => (kind === "attentions" && !sample.layers(kind).length ? "attention_mean" : kind);

// By name: {title, matrix(progress)}. A matrix is {rows, columns, values, layers}, with `columnName`
// where its columns are no tokens. `progress(text)` is told what is read, and returns whether to go on.
export function quantitiesOf(sample) {
  const found = {};
  const states = (key, title, row, kind = "hidden_states") => {
    if (sample.layers(kind).length) found[key] = { title, matrix: (progress) => ofStates(sample, kind, row, progress) };
  };
  const attention = (key, title, row) => {
    const kind = kindOf(sample, "attentions");
    if (sample.layers(kind).length) found[key] = { title, matrix: (progress) => ofAttention(sample, kind, row, progress) };
  };
  states("norm", "norm of the state", (layer) => norms(layer));
  states("change", "norm of the change", (layer, { before }) => (before ? changes(layer, before) : null));
  states("cosine-before", "cosine with the layer before", (layer, { before }) => (before ? cosines(layer, before) : null));
  states("cosine-last", "cosine with the last layer", (layer, { last }) => cosines(layer, last));
  attention("entropy", "entropy of attention (nats)", (weights) => entropies(weights));
  attention("sink", "attention to the first token", (weights) => sinkMasses(weights));
  attention("lookback", "lookback ratio", (weights) => lookbacks(weights, sample.attrs.prompt_len ?? 0));
  for (const kind of Object.keys(sample.archive.kinds).sort()) {
    const axes = sample.archive.axes(kind);
    if (axes.join() === "token") states(`kind:${kind}`, `${kind}, stored`, ({ values }) => values, kind);
    else if (axes[0] === "token" && axes.length === 2 && kind !== "hidden_states") states(`kind:${kind}`, `norm of ${kind}`, (layer) => norms(layer), kind);
  }
  for (const [path, { shape, type }] of sample.objects) {
    const isScore = path.startsWith("extra/") && shape.length === 1 && shape[0] > 1 && shape[0] === sample.attrs.seq_len && /^b?float|^u?int/.test(type);
    if (isScore) found[path] = { title: `${path.slice(6)}, stored`, matrix: () => ofField(sample, path) };
  }
  for (const score of sample.archive.beside.scores) addScores(found, states, sample, score);
  return found;
}

function addScores(found, states, sample, { name, kind, layers, url, width, count }) {
  if (kind === "directions") {
    for (let number = 0; number < Math.min(count, MOST_DIRECTIONS); number += 1) {
      const title = `score ${name}${count > 1 ? ` ${number}` : ""}, of a file`;
      states(`score:${name}:${number}`, title, async (layer, { entry }) => {
        const at = layers.indexOf(entry.layer);
        return at < 0 ? null : projections(layer, await direction(sample, { url, width, count, name }, at * count + number));
      });
    }
    return;
  }
  found[`score:${name}`] = {
    title: `${name}, of a file`,
    async matrix() {
      const nbytes = layers.length * width * 4;
      const all = floats(await fileOf(sample, url).read(sample.number * nbytes, nbytes));
      const isByToken = kind === "tokens";
      const columns = isByToken ? Math.min(width, sample.attrs.seq_len) : width;
      const values = new Float32Array(layers.length * columns);
      layers.forEach((_, row) => values.set(all.subarray(row * width, row * width + columns), row * columns));
      return { rows: layers.length, columns, values, columnName: isByToken ? undefined : "column", layers: layers.map((layer) => ({ layer, name: `layer_${layer}` })) };
    },
  };
}

// Weights and, last, the intercept of one direction of a layer.
async function direction(sample, { url, width, name }, number) {
  const states = sample.entry(`hidden_states/${sample.layers("hidden_states")[0].name}`);
  if (states.shape.at(-1) !== width) throw new ViewError(`${name}: is for states of ${width} channels; ${sample.archive.name} has ${states.shape.at(-1)}`);
  return floats(await fileOf(sample, url).read(number * (width + 1) * 4, (width + 1) * 4));
}

function fileOf(sample, url) {
  const { beside } = sample.archive;
  beside.files ??= new Map();
  if (!beside.files.has(url)) beside.files.set(url, new RemoteFile(url));
  return beside.files.get(url);
}

const floats = (bytes) => new Float32Array(bytes.slice().buffer);

async function ofStates(sample, kind, row, progress) {
  const layers = sample.layers(kind);
  const names = layers.map((each) => each.name);
  const { shape } = sample.entry(`${kind}/${names[0]}`);
  const group = Math.max(1, Math.floor(GROUP_NBYTES / (shape.reduce((product, each) => product * each, 4))));
  const rows = [];
  let [before, last] = [null, null];
  for (let start = 0; start < names.length && progress(`layer ${start} of ${names.length}`); start += group) {
    const read = await sample.decodedLayers(kind, names.slice(start, start + group));
    last ??= (start + group >= names.length ? read : await sample.decodedLayers(kind, names.slice(-1))).at(-1);
    for (const [at, layer] of read.entries()) {
      rows.push((await row(layer, { before, last, entry: layers[start + at] })) ?? new Float32Array(layer.shape[0]).fill(NaN));
      before = layer;
    }
  }
  return stacked(rows, layers);
}

// Means over heads, some heads at a time.
async function ofAttention(sample, kind, row, progress) {
  const layers = sample.layers(kind);
  const rows = [];
  for (const { name } of layers) {
    const shape = sample.shape(kind, name);
    const heads = shape.length === 3 ? shape[0] : 1;
    const group = Math.max(1, Math.floor(GROUP_WEIGHTS / (shape.at(-1) * shape.at(-2))));
    const sum = new Float32Array(shape.at(-2));
    for (let head = 0; head < heads; head += group) {
      if (!progress(`layer ${rows.length} of ${layers.length}`)) return null;
      const span = heads > group ? [head, Math.min(heads, head + group)] : null;
      const [weights] = await sample.decodedLayers(kind, [name], span);
      const count = span ? span[1] - span[0] : heads;
      row(weights).forEach((value, at) => { sum[at] += (value * count) / heads; });
    }
    rows.push(sum);
  }
  return stacked(rows, layers);
}

async function ofField(sample, path) {
  const [array] = await sample.arrays([path]);
  return stacked([sample.floats(array)], [{ layer: null, name: path.slice(6) }]);
}

function stacked(rows, layers) {
  const columns = rows[0]?.length ?? 0;
  const values = new Float32Array(rows.length * columns);
  rows.forEach((each, number) => values.set(each.subarray(0, columns), number * columns));
  return { rows: rows.length, columns, values, layers: layers.slice(0, rows.length) };
}

export async function tokensOf(sample) {
  if (sample.has("tokens_decoded")) return (await sample.arrays(["tokens_decoded"]))[0].values;
  if (sample.has("tokens")) return Array.from((await sample.arrays(["tokens"]))[0].values, (id) => `[${id}]`);
  return Array.from({ length: sample.attrs.seq_len }, (_, number) => `[${number}]`);
}
