// Bytes of a chunk as they were before they were compressed.

// A zlib stream that must inflate to exactly so many bytes.
export async function inflated(bytes, rawNbytes) {
  const raw = new Uint8Array(rawNbytes);
  const stream = new DecompressionStream("deflate");
  const writer = stream.writable.getWriter();
  // What goes wrong here comes out of the reader, too.
  writer.write(bytes).catch(() => {});
  writer.close().catch(() => {});
  const reader = stream.readable.getReader();
  let filled = 0;
  for (;;) {
    const { done, value } = await reader.read().catch(() => { throw new RangeError("cannot be inflated; the file is damaged"); });
    if (done) break;
    if (filled + value.length > rawNbytes) {
      await reader.cancel();
      throw new RangeError(`inflates to more than ${rawNbytes} bytes; the file is damaged`);
    }
    raw.set(value, filled);
    filled += value.length;
  }
  if (filled !== rawNbytes) throw new RangeError(`inflates to ${filled} bytes, expected ${rawNbytes}`);
  return raw;
}

export function unshuffled(raw, itemNbytes) {
  if (itemNbytes === 1) return raw;
  const count = raw.length / itemNbytes;
  if (itemNbytes === 2) {
    const found = new Uint16Array(count);
    for (let at = 0; at < count; at += 1) found[at] = raw[at] | (raw[count + at] << 8);
    return new Uint8Array(found.buffer);
  }
  const found = new Uint8Array(raw.length);
  for (let plane = 0; plane < itemNbytes; plane += 1) {
    const from = plane * count;
    for (let at = 0, to = plane; at < count; at += 1, to += itemNbytes) found[to] = raw[from + at];
  }
  return found;
}
