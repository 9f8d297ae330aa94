// Reads archives as schema/SPEC.md, sections 8, 12 and 19, describe them: the index at the end of the
// file, then chunks. Nothing is read that is not shown.

import { createXXHash3 } from "hash-wasm";
import { RemoteFile, ViewError } from "./bytes.js";
import { inflated } from "./inflate.js";
import { inThread } from "./threads.js";

const MAGIC = [0x68, 0x35, 0x74, 0x72, 0x0d, 0x0a, 0x46, 0x31];
const TRAILER_NBYTES = 64;
const ROWS_PER_GROUP = 1000;
const KNOWN_FEATURES = new Set(["encoded-layers"]);
// What one array, table or text may take in memory.
const MOST_NBYTES = 1024 * 1024 * 1024;
// Of arrays that were read and are kept, of one archive.
const KEPT_NBYTES = 512 * 1024 * 1024;
const ITEM_NBYTES = {
  float16: 2, bfloat16: 2, float32: 4, float64: 8, int8: 1, int16: 2, int32: 4, int64: 8,
  uint8: 1, uint16: 2, uint32: 4, uint64: 8,
};
const KIND_AXES = {
  hidden_states: ["token", "hidden"],
  attentions: ["head", "query", "key"],
  attention_mean: ["query", "key"],
};

let hasher = null;

async function checksum(bytes) {
  hasher ??= await createXXHash3(0, 0);
  return BigInt(`0x${hasher.init().update(bytes).digest("hex")}`);
}

async function checked(bytes, expected, what) {
  if ((await checksum(bytes)) !== expected) {
    throw new ViewError(`${what}: the checksum does not fit; the file is damaged, or was changed`);
  }
  return bytes;
}

// Chunks smaller than this are inflated at once.
const SMALL_NBYTES = 128 * 1024;

// A zlib stream that must inflate to exactly so many bytes.
async function inflate(bytes, rawNbytes, what) {
  canInflate();
  if (rawNbytes > MOST_NBYTES) throw new ViewError(`${what}: takes ${rawNbytes} bytes, too many for a browser`);
  return inflated(bytes, rawNbytes).catch((error) => { throw new ViewError(`${what}: ${error.message}`); });
}

function canInflate() {
  if (typeof DecompressionStream === "undefined") {
    throw new ViewError(
      "this browser cannot inflate (no DecompressionStream); use Chrome or Edge 90, Firefox 113, " +
      "Safari 16.4, or later ones");
  }
}

// --- text (section 8) ---------------------------------------------------------------------------

export function plainText(text) {
  return text.replace(/\u241b([0-9A-F]{4})/g, (_, digits) => String.fromCharCode(parseInt(digits, 16)));
}

// JSON of the index holds integers of 64 bits, which become text here, and numbers that are not
// finite, which become null.
export function parseJson(bytes) {
  const text = typeof bytes === "string" ? bytes : new TextDecoder("utf-8").decode(bytes);
  const odd = /"(?:[^"\\]|\\.)*"|-?Infinity|NaN|-?\d{16,}(?![\d.eE])/g;
  return JSON.parse(text.replace(odd, (found) => {
    if (found[0] === '"') return found;
    return /\d/.test(found) ? `"${found}"` : "null";
  }));
}

export async function fetchJson(url) {
  const response = await fetch(url, { cache: "no-store" }).catch(() => null);
  if (!response?.ok) throw new ViewError(`${url}: the server answers ${response?.status ?? "nothing"} ${(await response?.text())?.slice(0, 500) ?? ""}`);
  return parseJson(new Uint8Array(await response.arrayBuffer()));
}

// --- archives -----------------------------------------------------------------------------------

export const nameOf = (url) => decodeURIComponent(url.split(/[?#]/)[0].split("/").at(-1));

export class Archive {
  // What lies beside the file: `labels` and `checks` are addresses of JSON, `scores` a list.
  constructor(url, { name, labels, checks, scores } = {}) {
    this.file = new RemoteFile(url);
    this.name = name ?? nameOf(url);
    this.beside = { labels, checks, scores: scores ?? [] };
    this.rows = new Map();
    this.tables = new Map();
    this.scales = new Map();
    this.used = []; // [{sample, key, nbytes}], of all arrays that are kept
    this.usedNbytes = 0;
  }

  // Forgets the arrays that were read first where too many are kept.
  note(sample, key, nbytes) {
    this.used.push({ sample, key, nbytes });
    this.usedNbytes += nbytes;
    while (this.usedNbytes > KEPT_NBYTES && this.used.length > 1) {
      const oldest = this.used.shift();
      this.usedNbytes -= oldest.nbytes;
      oldest.sample.read.delete(oldest.key);
    }
  }

  static async open(url, beside) {
    const archive = new Archive(url, beside);
    await archive.#readIndex();
    archive.labels = await archive.#labels();
    return archive;
  }

  // The labels beside the archive, section 18: {label, scores} by ordinal, with the id of the sample.
  async #labels() {
    const found = new Map();
    if (!this.beside.labels) return found;
    const document = await fetchJson(this.beside.labels);
    if (document.format !== "h5traces-labels" || document.archive_id !== this.root.archive_id || document.num_samples !== this.numSamples) {
      throw new ViewError(`${this.name}: the labels beside it belong to another archive; run 'h5traces label' again`);
    }
    document.ordinals.forEach((ordinal, row) => found.set(ordinal, {
      id: document.sample_ids[row],
      label: document.labels?.[row],
      scores: Object.fromEntries(Object.entries(document.scores).map(([name, column]) => [name, column[row]])),
    }));
    return found;
  }

  async #readIndex() {
    const tail = await this.file.tail();
    const size = this.file.size;
    const trailer = tail.subarray(tail.length - TRAILER_NBYTES);
    if (trailer.length < TRAILER_NBYTES || !MAGIC.every((byte, number) => trailer[56 + number] === byte)) {
      throw new ViewError(await this.#whyNoIndex());
    }
    const view = new DataView(trailer.buffer, trailer.byteOffset, TRAILER_NBYTES);
    await checked(trailer.subarray(0, 48), view.getBigUint64(48, true), `${this.name}: trailer`);
    const [bodyNbytes, storedNbytes, rawNbytes, hdf5Nbytes] = [0, 8, 16, 24].map((at) => whole(view.getBigUint64(at, true)));
    if (view.getUint32(40, true) !== 1) {
      throw new ViewError(`${this.name}: its index is of a newer version of the format; take a newer h5traces`);
    }
    if (hdf5Nbytes + bodyNbytes + storedNbytes + TRAILER_NBYTES !== size) {
      throw new ViewError(`${this.name}: its size does not fit its index; the file was cut or appended to`);
    }
    this.start = hdf5Nbytes;
    const at = hdf5Nbytes + bodyNbytes;
    const stored = await checked(await this.file.read(at, storedNbytes), view.getBigUint64(32, true), `${this.name}: index`);
    this.directory = parseJson(await inflate(stored, rawNbytes, `${this.name}: index`));
    this.root = this.directory.archive;
    this.#checkVersion();
    const [ids, names, attrs] = await Promise.all(["ids", "names", "attrs"].map((each) => this.#column(each)));
    [this.ids] = ids;
    this.names = names;
    this.attrs = attrs;
    this.numSamples = this.directory.num_samples;
    let offset = this.start;
    this.groups = this.directory.groups.map(([nbytes, sum]) => {
      offset += nbytes;
      return { start: offset - nbytes, nbytes, checksum: BigInt(sum) };
    });
  }

  #checkVersion() {
    const major = String(this.root.format_version).split(".")[0];
    if (major !== "1") {
      throw new ViewError(`${this.name}: has format ${this.root.format_version}, this page knows 1.x; take a newer h5traces`);
    }
    const features = typeof this.root.required_features === "string" ? JSON.parse(this.root.required_features) : this.root.required_features ?? [];
    const unknown = features.filter((each) => !KNOWN_FEATURES.has(each));
    if (unknown.length) {
      throw new ViewError(`${this.name}: needs ${unknown.join(", ")}, which this page does not know; take a newer h5traces`);
    }
  }

  async #whyNoIndex() {
    const head = await this.file.read(0, Math.min(8, this.file.size));
    if ([0x89, 0x48, 0x44, 0x46].every((byte, number) => head[number] === byte)) {
      return `${this.name}: has no index at its end, as programs remove it that change HDF5 files; ` +
        `run 'h5traces seal ${this.name}', which rebuilds it`;
    }
    return `${this.name}: is no archive of h5traces; 'h5traces convert' makes one of other files`;
  }

  async #column(name) {
    const [offset, storedNbytes, rawNbytes, sum] = this.directory.columns[name];
    const what = `${this.name}: index, ${name}`;
    const stored = await checked(await this.file.read(this.start + offset, storedNbytes), BigInt(sum), what);
    return parseJson(await inflate(stored, rawNbytes, what));
  }

  // Number of layers by kind, and what each kind is.
  get kinds() {
    return this.directory.kinds;
  }

  axes(kind) {
    const stated = this.kinds[kind]?.axes;
    return KIND_AXES[kind] ?? (typeof stated === "string" ? JSON.parse(stated) : stated) ?? [];
  }

  async #table(group) {
    if (!this.tables.has(group)) {
      const found = this.groups[group];
      const last = group === this.groups.length - 1;
      const total = this.numSamples + (this.directory.has_scales ? 1 : 0);
      const count = last ? total - group * ROWS_PER_GROUP : ROWS_PER_GROUP;
      // Rows of the first samples lie behind the table; they come with it.
      const ahead = Math.min(found.nbytes, count * 16 + 64 * 1024);
      const bytes = (await this.file.read(found.start, ahead)).subarray(0, count * 16);
      await checked(bytes, found.checksum, `${this.name}: index, group ${group}`);
      const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
      let offset = found.start + count * 16;
      const rows = Array.from({ length: count }, (_, number) => {
        const [storedNbytes, rawNbytes] = [view.getUint32(number * 16, true), view.getUint32(number * 16 + 4, true)];
        offset += storedNbytes;
        return { start: offset - storedNbytes, storedNbytes, rawNbytes, checksum: view.getBigUint64(number * 16 + 8, true) };
      });
      this.tables.set(group, rows);
    }
    return this.tables.get(group);
  }

  // Several samples' rows, fetched together.
  async samples(numbers) {
    const places = await Promise.all(numbers.map(async (number) => (await this.#table(Math.floor(number / ROWS_PER_GROUP)))[number % ROWS_PER_GROUP]));
    const wanted = numbers.map((number, at) => [number, places[at]]).filter(([number]) => !this.rows.has(number));
    const stored = await this.file.readAll(wanted.map(([, place]) => [place.start, place.storedNbytes]));
    await Promise.all(wanted.map(async ([number, place], at) => {
      const what = `${this.name}: index, sample ${number}`;
      await checked(stored[at], place.checksum, what);
      const raw = await inflate(stored[at], place.rawNbytes, what);
      this.rows.set(number, new Sample(this, number, parseRow(this, raw, what)));
    }));
    return numbers.map((number) => this.rows.get(number));
  }

  async sample(number) {
    return (await this.samples([number]))[0];
  }

  // Step, offset and sigma of a layer's channels.
  async scale(path) {
    if (!this.scales.has(path)) {
      const held = await this.sample(this.numSamples);
      const base = path.replace(/^\//, "");
      const [step, offset] = await held.arrays([`${base}/step`, `${base}/offset`]);
      this.scales.set(path, { step: step.values, offset: offset.values });
    }
    return this.scales.get(path);
  }
}

function whole(number) {
  if (number > BigInt(Number.MAX_SAFE_INTEGER)) throw new ViewError("the index claims sizes that no file has");
  return Number(number);
}

// Objects of a sample by path, and its attributes.
function parseRow(archive, raw, what) {
  const view = new DataView(raw.buffer, raw.byteOffset, raw.length);
  const [numObjects, numAxes, numChunks, attrsNbytes] = [0, 4, 8, 12].map((at) => view.getUint32(at, true));
  const expected = 16 + numObjects * (16 + 4 + 4 + 4 + 2 + 1 + 1) + numChunks * 24 + numAxes * 16 + attrsNbytes;
  if (expected !== raw.length) throw new ViewError(`${what}: its parts do not fit its size; the file is damaged`);
  let at = 16 + numObjects * 16;
  const sums = at;
  const gaps = sums + numChunks * 8;
  const sizes = gaps + numChunks * 8;
  const dims = sizes + numChunks * 8;
  const chunkDims = dims + numAxes * 8;
  at = chunkDims + numAxes * 8;
  const [names, attrs, counts] = [at, at + numObjects * 4, at + numObjects * 8];
  const types = at + numObjects * 12;
  const codecs = types + numObjects * 2;
  const ranks = codecs + numObjects;
  const objects = new Map();
  let [chunk, axis, end] = [0, 0, 0];
  for (let number = 0; number < numObjects; number += 1) {
    const rank = view.getUint8(ranks + number);
    const count = view.getUint32(counts + number * 4, true);
    const chunks = [];
    for (let each = 0; each < count; each += 1, chunk += 1) {
      const start = end + Number(view.getBigInt64(gaps + chunk * 8, true));
      const nbytes = Number(view.getBigInt64(sizes + chunk * 8, true));
      end = start + nbytes;
      chunks.push({ start, nbytes, checksum: view.getBigUint64(sums + chunk * 8, true) });
    }
    const lengths = (from) => Array.from({ length: rank }, (_, each) => Number(view.getBigInt64(from + (axis + each) * 8, true)));
    objects.set(archive.names[view.getUint32(names + number * 4, true)], {
      attrs: archive.attrs[view.getUint32(attrs + number * 4, true)],
      type: archive.directory.types[view.getUint16(types + number * 2, true)],
      codec: archive.directory.codecs[view.getUint8(codecs + number)],
      shape: lengths(dims),
      chunkShape: lengths(chunkDims),
      chunks,
    });
    axis += rank;
  }
  return { objects, attrs: parseJson(raw.subarray(raw.length - attrsNbytes)) };
}

export class Sample {
  constructor(archive, number, { objects, attrs }) {
    this.archive = archive;
    this.number = number;
    this.objects = objects;
    this.attrs = attrs;
    this.read = new Map();
    const beside = archive.labels?.get(number);
    const stored = attrs.scores === undefined ? {} : typeof attrs.scores === "string" ? parseJson(attrs.scores) : attrs.scores;
    this.scores = { ...stored, ...beside?.scores };
    this.label = beside?.label ?? attrs.label ?? null;
    if (beside && beside.id !== attrs.sample_id) {
      throw new ViewError(`${archive.name}: sample ${number} has another id in the labels beside the archive; run 'h5traces label' again`);
    }
  }

  has(path) {
    return this.objects.has(path);
  }

  // Layers of a kind: [{name, layer}], the embedding first (layer null). Attentions may follow from
  // queries and keys.
  layers(kind) {
    const stored = this.#stored(kind);
    if (stored.length || kind !== "attentions") return stored;
    return this.#stored("queries").filter(({ name }) => this.entry(`queries/${name}`).attrs.mask && this.has(`keys/${name}`));
  }

  // (heads, queries, keys) of attentions, whether they are stored or follow from queries and keys.
  shape(kind, name) {
    if (kind !== "attentions" || this.has(`${kind}/${name}`)) return this.entry(`${kind}/${name}`).shape;
    const [heads, tokens] = this.entry(`queries/${name}`).shape;
    return [heads, tokens, tokens];
  }

  #stored(kind) {
    const found = [];
    for (const path of this.objects.keys()) {
      if (!path.startsWith(`${kind}/`)) continue;
      const name = path.slice(kind.length + 1);
      const number = /^(?:layer|position)_(\d{3,})$/.exec(name);
      if (number) found.push({ name, layer: Number(number[1]) });
      else if (name === "embedding") found.push({ name, layer: null });
    }
    return found.sort((one, other) => (one.layer ?? -1) - (other.layer ?? -1));
  }

  entry(path) {
    const found = this.objects.get(path);
    if (!found) throw new ViewError(`${this.archive.name}: sample ${this.number} does not store ${path}`);
    return found;
  }

  // Arrays as they are stored, {type, shape, values}: fetched together, and kept. With `span`, only
  // from its first number to before its second along the first axis, such as one head.
  async arrays(paths, span = null) {
    const key = (path) => (span ? `${path}[${span}]` : path);
    const missing = paths.filter((path) => !this.read.has(key(path)));
    const wanted = missing.map((path) => ({ path, entry: this.entry(path), chosen: chosenChunks(this.entry(path), span) }));
    const ranges = wanted.flatMap(({ entry, chosen }) => chosen.map((each) => [entry.chunks[each].start, entry.chunks[each].nbytes]));
    const bytes = await this.archive.file.readAll(ranges);
    let next = 0;
    for (const { path, entry, chosen } of wanted) {
      const stored = new Map(chosen.map((each) => [each, bytes[next++]]));
      const what = `${this.archive.name}: sample ${this.number}, ${path}`;
      this.keep(key(path), restore(entry, stored, span, what));
    }
    return Promise.all(paths.map((path) => this.read.get(key(path))));
  }

  // Keeps what was read last, up to a bound.
  keep(key, promise) {
    this.read.set(key, promise);
    promise.then((array) => this.archive.note(this, key, array.values.byteLength ?? 0), () => this.read.delete(key));
  }

  // Numbers as they are stored, as float32.
  floats(array) {
    return asFloats(array);
  }

  // Layers of a kind by dataset name, decoded: {shape, values: Float32Array}.
  async decodedLayers(kind, names, span = null) {
    if (kind === "attentions" && names.length && !this.has(`${kind}/${names[0]}`)) {
      return Promise.all(names.map((name) => this.#weights(name, span)));
    }
    const stored = await this.arrays(names.map((name) => `${kind}/${name}`), span);
    return Promise.all(stored.map((array, at) => this.#decoded(kind, names[at], array, span)));
  }

  async #weights(name, span) {
    const { shape: [allHeads, tokens, width], attrs } = this.entry(`queries/${name}`);
    const [first, stop] = span ?? [0, allHeads];
    const numKeyHeads = this.entry(`keys/${name}`).shape[0];
    const keyHead = (head) => Math.floor((head * numKeyHeads) / allHeads);
    const keySpan = [keyHead(first), keyHead(stop - 1) + 1];
    const shape = [stop - first, tokens, tokens];
    if (!(shape.reduce((product, each) => product * each, 4) <= MOST_NBYTES)) {
      throw new ViewError(`${this.archive.name}: sample ${this.number}, attention of ${name} has ${shape.join(" × ")} weights, too many for a browser`);
    }
    const [[queries], [keys]] = await Promise.all([this.decodedLayers("queries", [name], [first, stop]), this.decodedLayers("keys", [name], keySpan)]);
    const ofHeads = (values) => (typeof values === "string" ? JSON.parse(values) : values)?.slice(first, stop);
    const values = await inThread("weights", {
      queries: queries.values, keys: keys.values, heads: stop - first, tokens, width,
      keyHeads: Array.from({ length: stop - first }, (_, head) => keyHead(first + head) - keySpan[0]),
      rule: { ...attrs, slopes: ofHeads(attrs.slopes), sinks: ofHeads(attrs.sinks) },
    });
    return { shape, values };
  }

  // Small pictures of all heads of a layer, {rows, columns, values}: the largest weight of every
  // square of positions, at most `most` by `most` of them.
  async thumbnails(kind, name, most) {
    const path = `${kind}/${name}`;
    const [heads, rows, columns] = this.shape(kind, name);
    const shift = Math.max(0, Math.ceil(Math.log2(Math.max(rows, columns) / most)));
    const size = [((rows - 1) >> shift) + 1, ((columns - 1) >> shift) + 1];
    const entry = this.objects.get(path);
    let values;
    if (!entry || entry.attrs.num_exceptions || !["float16", "bfloat16", "float32", "uint8"].includes(entry.type)) {
      values = new Float32Array(heads * size[0] * size[1]);
      for (let head = 0; head < heads; head += 1) {
        const [weights] = await this.decodedLayers(kind, [name], [head, head + 1]);
        merge(values, size, { part: pooledHere(weights, shift, size), first: [head, 0, 0], counts: [1, ...size] });
      }
    } else {
      const codes = new { 1: Uint8Array, 2: Int16Array, 4: Float32Array }[itemSize(entry.type)](heads * size[0] * size[1]);
      const grid = gridOf(entry);
      await Promise.all(entry.chunks.map(async ({ start, nbytes }, number) => {
        const each = await this.archive.file.read(start, nbytes);
        const first = firstOf(number, grid, entry.chunkShape);
        const pool = { shape: entry.shape, chunkShape: entry.chunkShape, first, shift };
        const part = await unpacked(entry, number, each, `${this.archive.name}: sample ${this.number}, ${path}`, pool);
        const stop = first.map((from, axis) => Math.min(from + entry.chunkShape[axis], entry.shape[axis]));
        const counts = [stop[0] - first[0], ...[1, 2].map((axis) => ((stop[axis] - 1) >> shift) - (first[axis] >> shift) + 1)];
        merge(codes, size, { part, first: [first[0], first[1] >> shift, first[2] >> shift], counts });
      }));
      const stored = codes instanceof Int16Array ? new Uint16Array(codes.buffer) : codes;
      ({ values } = await this.#decoded(kind, name, { type: entry.type, shape: [heads, ...size], values: stored }, null));
    }
    return Array.from({ length: heads }, (_, head) => (
      { rows: size[0], columns: size[1], values: values.subarray(head * size[0] * size[1], (head + 1) * size[0] * size[1]) }));
  }

  async #decoded(kind, name, array, span) {
    const { attrs, shape } = this.entry(`${kind}/${name}`);
    const start = span ? span[0] * shape.slice(1).reduce((product, each) => product * each, 1) : 0;
    const place = `${this.archive.name}: sample ${this.number}, ${kind}/${name}`;
    if (this.has(`${kind}/steps`)) throw new ViewError(`${place}: holds generation steps, which this page does not show`);
    let values = asFloats(array);
    if (attrs.encoding === "channel-steps" && attrs.encoding_version === "1") {
      const { step, offset } = await this.archive.scale(attrs.scales);
      values = channelSteps(array.values, step, offset, attrs.zero_point, attrs.spacing, attrs.restored_dtype);
    } else if (attrs.encoding === "sqrt-uint8" && attrs.encoding_version === "1") {
      values = Float32Array.from(array.values, (each) => toHalf((each / attrs.levels) ** 2));
    } else if (attrs.encoding && attrs.encoding !== "float16-rounded") {
      throw new ViewError(`${place}: is encoded as ${attrs.encoding} ${attrs.encoding_version}, which this page does not know`);
    }
    if (attrs.num_exceptions) {
      const layer = name === "embedding" ? -1 : Number(name.split("_")[1]);
      const [table] = await this.arrays([attrs.exceptions]);
      values = values === array.values ? values.slice() : values;
      for (let row = 0; row < table.shape[0]; row += 1) {
        const at = table.values[row * 3 + 1] - start;
        if (table.values[row * 3] === layer && at >= 0 && at < values.length) values[at] = table.values[row * 3 + 2];
      }
    }
    return { shape: array.shape, values };
  }
}

// Puts the largest values of a part (heads, rows, columns) into the picture of all heads.
function merge(whole, [rows, columns], { part, first, counts }) {
  let at = 0;
  for (let head = 0; head < counts[0]; head += 1) {
    for (let row = 0; row < counts[1]; row += 1) {
      const to = ((first[0] + head) * rows + first[1] + row) * columns + first[2];
      for (let column = 0; column < counts[2]; column += 1, at += 1) {
        if (part[at] > whole[to + column]) whole[to + column] = part[at];
      }
    }
  }
}

function pooledHere({ shape: [, rows, columns], values }, shift, size) {
  const found = new Float32Array(size[0] * size[1]);
  for (let row = 0, at = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1, at += 1) {
      const cell = (row >> shift) * size[1] + (column >> shift);
      if (values[at] > found[cell]) found[cell] = values[at];
    }
  }
  return found;
}

function channelSteps(codes, step, offset, zeroPoint, spacing, restored) {
  const width = step.length;
  const values = new Float32Array(codes.length);
  for (let at = 0; at < codes.length; at += 1) {
    const channel = at % width;
    const value = Math.fround(offset[channel] + Math.fround(Math.fround((codes[at] - zeroPoint) / spacing) * step[channel]));
    values[at] = restored === "float16" ? toHalf(value) : value;
  }
  return values;
}

// --- chunks -------------------------------------------------------------------------------------

// Numbers of the chunks that hold a span of the first axis; all without one.
function chosenChunks({ chunks, shape, chunkShape }, span) {
  const all = chunks.map((_, number) => number);
  if (!span) return all;
  const perRow = shape.slice(1).reduce((product, length, axis) => product * Math.ceil(length / chunkShape[axis + 1]), 1);
  return all.filter((number) => {
    const first = Math.floor(number / perRow) * chunkShape[0];
    return first < span[1] && first + chunkShape[0] > span[0];
  });
}

async function restore(entry, stored, span, what) {
  const itemNbytes = itemSize(entry.type);
  const shape = span ? [span[1] - span[0], ...entry.shape.slice(1)] : entry.shape;
  const count = shape.reduce((product, each) => product * each, 1);
  if (!(count * itemNbytes <= MOST_NBYTES)) throw new ViewError(`${what}: has ${count} values, too many for a browser`);
  const whole = new Uint8Array(count * itemNbytes);
  const grid = gridOf(entry);
  const numChunks = entry.shape.includes(0) ? 0 : grid.reduce((product, each) => product * each, 1);
  if (numChunks !== entry.chunks.length) throw new ViewError(`${what}: ${entry.chunks.length} chunks are stored, expected ${numChunks}`);
  await Promise.all(Array.from(stored, async ([number, bytes]) => {
    const raw = await unpacked(entry, number, bytes, what);
    place(whole, raw, { shape, chunkShape: entry.chunkShape }, number, grid, itemNbytes, span ? span[0] : 0);
  }));
  return { type: entry.type, shape, values: typed(whole, entry.type, itemNbytes, what) };
}

// The bytes of a chunk as they were before they were compressed; with `pool`, a small picture of it.
async function unpacked(entry, number, bytes, what, pool) {
  await checked(bytes, entry.chunks[number].checksum, what);
  canInflate();
  const itemNbytes = itemSize(entry.type);
  const rawNbytes = entry.chunkShape.reduce((product, each) => product * each, itemNbytes);
  if (rawNbytes <= SMALL_NBYTES && entry.codec === "deflate" && !pool) return inflate(bytes, rawNbytes, what);
  if (!(rawNbytes <= MOST_NBYTES)) throw new ViewError(`${what}: a chunk has ${rawNbytes} bytes, too many for a browser`);
  const own = bytes.slice();
  return inThread("chunk", { bytes: own, codec: entry.codec, rawNbytes, itemNbytes, pool }, [own.buffer])
    .catch((error) => { throw new ViewError(`${what}: ${error.message}`); });
}

function itemSize(type) {
  const text = /^text:(\d+)$/.exec(type);
  return text ? Number(text[1]) : ITEM_NBYTES[type];
}

const gridOf = ({ shape, chunkShape }) => shape.map((length, axis) => Math.ceil(length / chunkShape[axis]));

// Where a chunk begins on every axis.
function firstOf(number, grid, chunkShape) {
  const first = new Array(grid.length);
  for (let axis = grid.length - 1, rest = number; axis >= 0; axis -= 1) {
    first[axis] = (rest % grid[axis]) * chunkShape[axis];
    rest = Math.floor(rest / grid[axis]);
  }
  return first;
}

// Copies a chunk to its place in the array, which begins at `start` of the first axis; edge chunks
// reach beyond it.
function place(whole, raw, { shape, chunkShape }, number, grid, itemNbytes, start) {
  const rank = shape.length;
  const first = firstOf(number, grid, chunkShape);
  if (rank) first[0] -= start;
  const from = first.map((each) => Math.max(0, -each));
  const stop = chunkShape.map((length, axis) => Math.min(length, shape[axis] - first[axis]));
  const rowNbytes = (stop[rank - 1] - from[rank - 1]) * itemNbytes;
  const index = from.slice();
  for (;;) {
    let [source, target] = [0, 0];
    for (let axis = 0; axis < rank; axis += 1) {
      source = source * chunkShape[axis] + index[axis];
      target = target * shape[axis] + first[axis] + index[axis];
    }
    whole.set(raw.subarray(source * itemNbytes, source * itemNbytes + rowNbytes), target * itemNbytes);
    let axis = rank - 2;
    for (; axis >= 0; axis -= 1) {
      index[axis] += 1;
      if (index[axis] < stop[axis]) break;
      index[axis] = from[axis];
    }
    if (axis < 0) return;
  }
}

function typed(bytes, type, itemNbytes, what) {
  const arrays = {
    float32: Float32Array, float64: Float64Array, int8: Int8Array, int16: Int16Array, int32: Int32Array,
    int64: BigInt64Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array,
    uint64: BigUint64Array, float16: Uint16Array, bfloat16: Uint16Array,
  };
  if (arrays[type]) return new arrays[type](bytes.buffer, 0, bytes.length / itemNbytes);
  const decoder = new TextDecoder("utf-8");
  return Array.from({ length: itemNbytes ? bytes.length / itemNbytes : 0 }, (_, number) => {
    let stop = (number + 1) * itemNbytes;
    while (stop > number * itemNbytes && bytes[stop - 1] === 0) stop -= 1;
    return plainText(decoder.decode(bytes.subarray(number * itemNbytes, stop)));
  });
}

// --- numbers ------------------------------------------------------------------------------------

const HALVES = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits += 1) {
  const [sign, exponent, mantissa] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  HALVES[bits] = exponent === 31 ? (mantissa ? NaN : sign * Infinity)
    : exponent ? sign * 2 ** (exponent - 15) * (1 + mantissa / 1024) : sign * 2 ** -14 * (mantissa / 1024);
}

// The nearest float16, ties to even.
export function toHalf(value) {
  const size = Math.abs(value);
  if (!(size > 0) || size === Infinity) return value;
  const exponent = Math.max(-14, Math.floor(Math.log2(size)));
  const unit = 2 ** (exponent - 10);
  let steps = size / unit;
  const below = Math.floor(steps);
  const rest = steps - below;
  steps = rest > 0.5 || (rest === 0.5 && below % 2) ? below + 1 : below;
  const rounded = steps * unit;
  return Math.sign(value) * (rounded > 65504 ? Infinity : rounded);
}

// Stored numbers as float32, in which every float16 and bfloat16 has its place.
export function asFloats({ type, values }) {
  if (type === "float16") {
    const found = new Float32Array(values.length);
    for (let at = 0; at < values.length; at += 1) found[at] = HALVES[values[at]];
    return found;
  }
  if (type === "bfloat16") {
    const wide = new Uint32Array(values.length);
    for (let at = 0; at < values.length; at += 1) wide[at] = values[at] << 16;
    return new Float32Array(wide.buffer);
  }
  return type === "float32" ? values : Float32Array.from(values, Number);
}
