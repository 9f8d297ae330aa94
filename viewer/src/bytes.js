// Ranges of bytes of a file on a server, fetched once and in few requests.

export class ViewError extends Error {}

// Requests closer to one another than this become one.
const GAP = 64 * 1024;
// What one request asks for, but for a single chunk.
const MOST_NBYTES = 16 * 1024 * 1024;
const KEPT_NBYTES = 256 * 1024 * 1024;
const TAIL_NBYTES = 128 * 1024;

export class RemoteFile {
  constructor(url) {
    this.url = url;
    this.size = null;
    this.tag = null;
    this.kept = []; // [{start, bytes}], the last used last
    this.keptNbytes = 0;
    this.waiting = []; // ranges asked for at the same time: [{start, nbytes, resolve, reject}]
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
    return Promise.all(ranges.map(([start, nbytes]) => (nbytes ? this.#find(start, nbytes) ?? this.#wait(start, nbytes) : new Uint8Array(0))));
  }

  // What several parts of the page ask for at the same time is fetched together.
  #wait(start, nbytes) {
    return new Promise((resolve, reject) => {
      if (!this.waiting.length) setTimeout(() => this.#fetchWaiting());
      this.waiting.push({ start, nbytes, resolve, reject });
    });
  }

  #fetchWaiting() {
    const waiting = this.waiting;
    this.waiting = [];
    for (const [start, nbytes] of joined(waiting.map((each) => [each.start, each.nbytes]))) {
      const inside = waiting.filter((each) => each.start >= start && each.start + each.nbytes <= start + nbytes);
      // Each part is given as soon as it has come.
      const arrived = (bytes, filled) => {
        for (const each of inside) {
          if (each.start + each.nbytes <= start + filled) each.resolve(bytes.subarray(each.start - start, each.start - start + each.nbytes));
        }
      };
      this.#request(`bytes=${start}-${start + nbytes - 1}`, nbytes, arrived)
        .then(({ bytes }) => this.#keep(start, bytes), (error) => { for (const each of inside) each.reject(error); });
    }
  }

  async #request(range, nbytes, arrived) {
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
    const expected = Number(stated[2]) - start + 1;
    if (nbytes && expected !== nbytes) throw new ViewError(`${this.url}: the server sends ${expected} bytes of a range of ${nbytes}`);
    const bytes = new Uint8Array(expected);
    const reader = response.body.getReader();
    let filled = 0;
    for (;;) {
      const { done, value } = await reader.read().catch(() => ({ done: true }));
      if (done) break;
      if (filled + value.length > expected) throw new ViewError(`${this.url}: the server sends more than the range of ${expected} bytes`);
      bytes.set(value, filled);
      filled += value.length;
      arrived?.(bytes, filled);
    }
    if (filled !== expected) throw new ViewError(`${this.url}: the server sent ${filled} bytes of a range of ${expected}`);
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
