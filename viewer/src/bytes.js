// Ranges of bytes of a file on a server, fetched once and in few requests.

export class ViewError extends Error {}

// Requests closer to one another than this become one.
const GAP = 64 * 1024;
// What one request asks for, but for a single chunk.
const MOST_NBYTES = 64 * 1024 * 1024;
const KEPT_NBYTES = 256 * 1024 * 1024;
const TAIL_NBYTES = 128 * 1024;

export class RemoteFile {
  constructor(url) {
    this.url = url;
    this.size = null;
    this.tag = null;
    this.kept = []; // [{start, bytes}], the last used last
    this.keptNbytes = 0;
    this.waiting = null; // ranges asked for at the same time, and the promise of their bytes
  }

  // The last bytes of the file; the first request, which also tells its size.
  async tail() {
    if (this.size === null) {
      const { bytes, start } = await this.#request(`bytes=-${TAIL_NBYTES}`);
      this.#keep(start, bytes);
    }
    return this.read(Math.max(0, this.size - TAIL_NBYTES), Math.min(this.size, TAIL_NBYTES));
  }

  async read(start, nbytes) {
    return (await this.readAll([[start, nbytes]]))[0];
  }

  // Many ranges [start, nbytes], in the order given.
  async readAll(ranges) {
    for (const [start, nbytes] of ranges) {
      const inside = Number.isSafeInteger(start) && Number.isSafeInteger(nbytes) && start >= 0 &&
        nbytes >= 0 && (this.size === null || start + nbytes <= this.size);
      if (!inside) throw new ViewError(`${this.url}: a range lies outside of the file; it is damaged`);
    }
    const missing = ranges.filter(([start, nbytes]) => !this.#find(start, nbytes));
    const found = missing.length ? await this.#together(missing) : new Map();
    return ranges.map(([start, nbytes]) => {
      const kept = this.#find(start, nbytes);
      if (kept) return kept;
      for (const [from, bytes] of found) {
        if (from <= start && start + nbytes <= from + bytes.length) {
          return bytes.subarray(start - from, start - from + nbytes);
        }
      }
      return new Uint8Array(0);
    });
  }

  // What several parts of the page ask for at the same time is fetched together.
  #together(missing) {
    if (!this.waiting) {
      const ranges = [];
      const bytes = new Promise((resolve) => setTimeout(resolve)).then(async () => {
        this.waiting = null;
        return new Map(await Promise.all(joined(ranges).map(async ([start, nbytes]) => {
          const { bytes } = await this.#request(`bytes=${start}-${start + nbytes - 1}`, nbytes);
          this.#keep(start, bytes);
          return [start, bytes];
        })));
      });
      this.waiting = { ranges, bytes };
    }
    this.waiting.ranges.push(...missing);
    return this.waiting.bytes;
  }

  async #request(range, nbytes) {
    let response;
    try {
      const headers = { Range: range };
      if (this.tag) headers["If-Match"] = this.tag;
      response = await fetch(this.url, { headers, cache: "no-store" });
    } catch (error) {
      throw new ViewError(
        `${this.url}: the server does not answer, or does not let this page read it. A server ` +
        "must allow cross-origin requests: Access-Control-Allow-Origin, and " +
        "Access-Control-Allow-Headers: Range, and Access-Control-Expose-Headers: Content-Range, ETag.");
    }
    if (response.status === 412) {
      throw new ViewError(`${this.url}: the file was replaced while it was shown; load the page again`);
    }
    if (response.status === 404 || response.status === 410) {
      throw new ViewError(`${this.url}: there is no such file, or it was deleted`);
    }
    if (response.status === 200 && Number(response.headers.get("Content-Length") ?? Infinity) <= TAIL_NBYTES) {
      // Some servers answer so where the range is the whole file.
      const bytes = new Uint8Array(await response.arrayBuffer());
      this.size = bytes.length;
      return { bytes, start: 0 };
    }
    if (response.status === 200) {
      await response.body?.cancel();
      throw new ViewError(
        `${this.url}: the server sends whole files only. This page needs byte ranges ` +
        "(Accept-Ranges: bytes), as nginx, Apache, S3 and 'h5traces view' give them.");
    }
    if (response.status === 416) throw new ViewError(`${this.url}: the file is empty, or was cut`);
    if (response.status !== 206) {
      throw new ViewError(`${this.url}: the server answers ${response.status} ${response.statusText}: ${(await response.text()).slice(0, 500)}`);
    }
    const stated = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(response.headers.get("Content-Range") ?? "");
    if (!stated) {
      throw new ViewError(
        `${this.url}: the server does not tell the size of the file; it must expose ` +
        "Content-Range to other origins (Access-Control-Expose-Headers)");
    }
    const [start, size] = [Number(stated[1]), Number(stated[3])];
    this.tag ??= strongTag(response.headers.get("ETag"));
    if (this.size !== null && this.size !== size) {
      throw new ViewError(`${this.url}: the file was replaced while it was shown; load the page again`);
    }
    this.size = size;
    const bytes = new Uint8Array(await response.arrayBuffer());
    if (bytes.length !== Number(stated[2]) - start + 1 || (nbytes && bytes.length !== nbytes)) {
      throw new ViewError(`${this.url}: the server sent ${bytes.length} bytes of a range of ${nbytes}`);
    }
    return { bytes, start };
  }

  #find(start, nbytes) {
    for (let number = this.kept.length - 1; number >= 0; number -= 1) {
      const each = this.kept[number];
      if (each.start <= start && start + nbytes <= each.start + each.bytes.length) {
        this.kept.push(...this.kept.splice(number, 1));
        return each.bytes.subarray(start - each.start, start - each.start + nbytes);
      }
    }
    return null;
  }

  #keep(start, bytes) {
    this.kept.push({ start, bytes });
    this.keptNbytes += bytes.length;
    while (this.keptNbytes > KEPT_NBYTES && this.kept.length > 1) {
      this.keptNbytes -= this.kept.shift().bytes.length;
    }
  }
}

function strongTag(tag) {
  return tag && !tag.startsWith("W/") ? tag : null;
}

// Ranges that lie near one another, as one.
export function joined(ranges) {
  const sorted = ranges.filter(([, nbytes]) => nbytes > 0).sort((one, other) => one[0] - other[0]);
  const found = [];
  for (const [start, nbytes] of sorted) {
    const last = found.at(-1);
    if (last && start <= last[0] + last[1] + GAP && start + nbytes - last[0] <= MOST_NBYTES) {
      last[1] = Math.max(last[1], start + nbytes - last[0]);
    } else {
      found.push([start, nbytes]);
    }
  }
  return found;
}
