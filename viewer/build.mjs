// Builds the page into h5traces/view/page/; tools/build_viewer calls it.

import { copyFile, mkdir, readFile, readdir, writeFile } from "node:fs/promises";
import { createHash } from "node:crypto";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const target = new URL("../h5traces/view/page/", import.meta.url);
await mkdir(target, { recursive: true });
// Threads take a plain script: Firefox 113 knows no modules in them.
for (const [source, name, format] of [["src/app.jsx", "viewer.js", "esm"], ["src/worker.js", "worker.js", "iife"]]) {
  await build({
    entryPoints: [source],
    bundle: true,
    minify: true,
    format,
    target: ["chrome90", "firefox113", "safari16.4"],
    jsx: "automatic",
    jsxImportSource: "preact",
    legalComments: "none",
    outfile: new URL(name, target).pathname,
  });
}
await copyFile("src/style.css", new URL("viewer.css", target));
await copyFile("src/index.html", new URL("index.html", target));
const licences = [];
for (const name of ["preact", "hash-wasm", "fzstd"]) {
  const files = await readdir(`node_modules/${name}`);
  const file = files.find((each) => /^licen[cs]e/i.test(each));
  licences.push(`${name}\n\n${await readFile(`node_modules/${name}/${file}`, "utf8")}`);
}
await writeFile(new URL("LICENSES.txt", target), licences.join("\n\n"));
// Of the files that the page is made of, so that a test notices one that was not built anew.
const hash = createHash("sha256");
for (const name of [...(await readdir("src")).sort().map((each) => `src/${each}`), "build.mjs", "package-lock.json"]) {
  hash.update(await readFile(name));
}
await writeFile(new URL("SOURCE.sha256", target), `${hash.digest("hex")}\n`);
let total = 0;
for (const name of ["viewer.js", "worker.js", "viewer.css", "index.html"]) {
  total += gzipSync(await readFile(new URL(name, target))).length;
}
console.log(`${(total / 1000).toFixed(1)} kB gzipped`);
