// What takes long, in threads beside the page: a message {task, ...} gives {value} or {problem}.

import { decompress as unzstd } from "fzstd";
import { inflated, unshuffled } from "./inflate.js";
import { weights } from "./weights.js";

const SIGNED = { 1: Uint8Array, 2: Int16Array, 4: Float32Array };

const TASKS = {
  async chunk({ bytes, codec, rawNbytes, itemNbytes, pool }) {
    let raw = codec === "zstd" ? unzstd(bytes) : await inflated(bytes, rawNbytes);
    if (raw.length !== rawNbytes) throw new RangeError(`has ${raw.length} bytes, expected ${rawNbytes}`);
    if (pool && codec !== "deflate" && itemNbytes === 2) return pooledPlanes(raw, pool);
    if (codec !== "deflate") raw = unshuffled(raw, itemNbytes);
    return pool ? pooled(new SIGNED[itemNbytes](raw.buffer, 0, raw.length / itemNbytes), pool) : raw;
  },
  weights,
};

// Of a chunk of weights (head, query, key) that begins at `first`, the largest value of every square of
// 2 ** shift positions: a part of the small picture of all. Codes and the bits of floats that are not
// negative are in the order of their values.
function pooled(values, { shape, chunkShape, first, shift }) {
  const [heads, rows, columns] = chunkShape.map((length, axis) => Math.min(length, shape[axis] - first[axis]));
  const [top, left] = [first[1] >> shift, first[2] >> shift];
  const [height, width] = [((first[1] + rows - 1) >> shift) - top + 1, ((first[2] + columns - 1) >> shift) - left + 1];
  const found = new values.constructor(heads * height * width);
  for (let head = 0; head < heads; head += 1) {
    for (let row = 0; row < rows; row += 1) {
      const from = (head * chunkShape[1] + row) * chunkShape[2];
      const to = (head * height + ((first[1] + row) >> shift) - top) * width - left;
      for (let column = 0; column < columns; column += 1) {
        const value = values[from + column];
        const cell = to + ((first[2] + column) >> shift);
        if (value > found[cell]) found[cell] = value;
      }
    }
  }
  return found;
}

// The same of two planes of bytes, low and high, without putting them together first.
function pooledPlanes(raw, pool) {
  const count = raw.length / 2;
  const { chunkShape: [, rows, columns], shift, first } = pool;
  if ((first[1] | first[2]) & ((1 << shift) - 1)) return pooled(new Int16Array(unshuffled(raw, 2).buffer), pool);
  // Rows of squares: the largest value of each column first, then of each square.
  const width = Math.min(columns, pool.shape[2] - first[2]);
  const height = Math.min(rows, pool.shape[1] - first[1]);
  const heads = Math.min(pool.chunkShape[0], pool.shape[0] - first[0]);
  const size = [((height - 1) >> shift) + 1, ((width - 1) >> shift) + 1];
  const found = new Int16Array(heads * size[0] * size[1]);
  const line = new Int32Array(width);
  for (let head = 0, to = 0; head < heads; head += 1) {
    for (let top = 0; top < height; top += 1 << shift, to += size[1]) {
      line.fill(0);
      for (let row = top; row < Math.min(height, top + (1 << shift)); row += 1) {
        const from = (head * rows + row) * columns;
        for (let column = 0; column < width; column += 1) {
          const value = (raw[count + from + column] << 8) | raw[from + column];
          if (value > line[column] && value < 32768) line[column] = value;
        }
      }
      for (let column = 0; column < width; column += 1) {
        const cell = to + (column >> shift);
        if (line[column] > found[cell]) found[cell] = line[column];
      }
    }
  }
  return found;
}

self.onmessage = async ({ data: { id, task, ...given } }) => {
  try {
    const value = await TASKS[task](given);
    self.postMessage({ id, value }, [value.buffer]);
  } catch (error) {
    self.postMessage({ id, problem: error.message });
  }
};
