// A matrix as a picture on a canvas, of any size: what is shown is drawn anew, one look-up a pixel.

import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { NOTHING, amounts } from "./colours.js";
import { range } from "./numbers.js";

// Halves a matrix (rows, columns) by the largest of four values, so that single weights stay visible.
function halved({ rows, columns, values }) {
  const [halfRows, halfColumns] = [Math.ceil(rows / 2), Math.ceil(columns / 2)];
  const found = new Float32Array(halfRows * halfColumns).fill(NaN);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const at = (row >> 1) * halfColumns + (column >> 1);
      const value = values[row * columns + column];
      if (!(found[at] >= value)) found[at] = value;
    }
  }
  return { rows: halfRows, columns: halfColumns, values: found };
}

function pyramid(matrix) {
  const levels = [matrix];
  while (levels.at(-1).rows > 512 || levels.at(-1).columns > 512) levels.push(halved(levels.at(-1)));
  return levels;
}

// Draws the window {row, column, rows, columns} of a pyramid onto a whole canvas.
export function draw(canvas, levels, window, { limits, isSquareRoot, palette = amounts, threshold = -Infinity }) {
  const { width, height } = canvas;
  if (!width || !height) return;
  const perPixel = Math.min(window.rows / height, window.columns / width);
  const level = Math.max(0, Math.min(levels.length - 1, Math.floor(Math.log2(Math.max(1, perPixel)))));
  const { rows, columns, values } = levels[level];
  const shrink = 2 ** level;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = canvas.image?.width === width && canvas.image.height === height ? canvas.image : context.createImageData(width, height);
  canvas.image = image;
  const pixels = new Uint32Array(image.data.buffer);
  const colours = packed(palette);
  const [nothing] = packed(NOTHINGS);
  const [low, scale] = [limits[0], 1 / (limits[1] - limits[0] || 1)];
  const cut = threshold > 0 ? threshold : -Infinity;
  const from = Int32Array.from({ length: width }, (_, x) => Math.floor((window.column + ((x + 0.5) * window.columns) / width) / shrink));
  for (let y = 0, at = 0; y < height; y += 1) {
    const row = Math.floor((window.row + ((y + 0.5) * window.rows) / height) / shrink);
    const start = row >= 0 && row < rows ? row * columns : NaN;
    for (let x = 0; x < width; x += 1, at += 1) {
      const column = from[x];
      const value = column >= 0 && column < columns ? values[start + column] : undefined;
      if (value === undefined) { pixels[at] = 0; continue; }
      let share = value > cut ? (value - low) * scale : 0;
      share = share < 0 ? 0 : share > 1 ? 1 : share;
      pixels[at] = value !== value ? nothing : colours[(255 * (isSquareRoot ? Math.sqrt(share) : share) + 0.5) | 0];
    }
  }
  context.putImageData(image, 0, 0);
}

const NOTHINGS = [NOTHING];

// Colours as the pixels of an image hold them.
const kept = new Map();
function packed(palette) {
  if (!kept.has(palette)) kept.set(palette, Uint32Array.from(palette, ([red, green, blue, alpha = 255]) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0));
  return kept.get(palette);
}

export const WHOLE = ({ rows, columns }) => ({ row: 0, column: 0, rows, columns });

// A picture to point at. `matrix` is {rows, columns, values}; `onPoint` and `onChoose` get {row,
// column}; the wheel zooms, dragging moves, a double click shows all, arrow keys point at the next cell.
export function Heat({ matrix, limits, isSquareRoot, palette, threshold, height, label, chosen, onPoint, onChoose, testId }) {
  const canvas = useRef(null);
  const levels = useMemo(() => pyramid(matrix), [matrix]);
  const [window, setWindow] = useState(WHOLE(matrix));
  const [size, setSize] = useState(0);
  const drag = useRef(null);
  const pointer = useRef(null); // of the arrow keys
  useLayoutEffect(() => setWindow(WHOLE(matrix)), [matrix.rows, matrix.columns]);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setSize(Math.round(entry.contentRect.width)));
    observer.observe(canvas.current);
    return () => observer.disconnect();
  }, []);
  const shown = limits ?? range(matrix.values);
  useLayoutEffect(() => {
    const { clientWidth, clientHeight } = canvas.current;
    const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
    canvas.current.width = Math.round(clientWidth * ratio);
    canvas.current.height = Math.round(clientHeight * ratio);
    draw(canvas.current, levels, window, { limits: shown, isSquareRoot, palette, threshold });
  }, [matrix, window, size, isSquareRoot, palette, threshold, shown[0], shown[1]]);
  const cell = (event) => {
    const box = canvas.current.getBoundingClientRect();
    pointer.current = null;
    const row = Math.floor(window.row + ((event.clientY - box.top) / box.height) * window.rows);
    const column = Math.floor(window.column + ((event.clientX - box.left) / box.width) * window.columns);
    const inside = row >= 0 && row < matrix.rows && column >= 0 && column < matrix.columns;
    return inside ? { row, column } : null;
  };
  const press = (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    const now = pointer.current ?? chosen ?? { row: 0, column: 0 };
    if (event.key === "Enter") onChoose?.(now);
    if (!down && !right) return;
    event.preventDefault();
    pointer.current = { row: Math.min(matrix.rows - 1, Math.max(0, now.row + down)), column: Math.min(matrix.columns - 1, Math.max(0, now.column + right)) };
    onPoint?.(pointer.current);
  };
  const zoom = (event) => {
    event.preventDefault();
    const box = canvas.current.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    const factor = Math.exp(event.deltaY / 400);
    setWindow((now) => {
      const rows = Math.min(matrix.rows, Math.max(4, now.rows * factor));
      const columns = Math.min(matrix.columns, Math.max(4, now.columns * factor));
      return bounded({ row: now.row + y * (now.rows - rows), column: now.column + x * (now.columns - columns), rows, columns }, matrix);
    });
  };
  const move = (event) => {
    if (drag.current && event.buttons) {
      const box = canvas.current.getBoundingClientRect();
      const { x, y, from } = drag.current;
      drag.current.moved ||= Math.abs(event.clientX - x) + Math.abs(event.clientY - y) > 3;
      setWindow(bounded({
        ...from,
        row: from.row - ((event.clientY - y) / box.height) * from.rows,
        column: from.column - ((event.clientX - x) / box.width) * from.columns,
      }, matrix));
    } else {
      onPoint?.(cell(event));
    }
  };
  return (
    <div class="heat-box">
      <canvas ref={canvas} class="heat" style={{ height: `${height}px` }} role="img" aria-label={label} tabIndex={0}
        data-testid={testId}
        onWheel={zoom} onKeyDown={press}
        onMouseDown={(event) => { drag.current = { x: event.clientX, y: event.clientY, from: window, moved: false }; }}
        onMouseMove={move} onMouseLeave={() => onPoint?.(null)}
        onClick={(event) => { if (!drag.current?.moved) { const found = cell(event); if (found) onChoose?.(found); } }}
        onDblClick={() => setWindow(WHOLE(matrix))} />
      {chosen ? <Mark window={window} cell={chosen} /> : null}
    </div>
  );
}

function bounded(window, { rows, columns }) {
  return {
    ...window,
    row: Math.min(Math.max(0, window.row), rows - window.rows),
    column: Math.min(Math.max(0, window.column), columns - window.columns),
  };
}

// A frame around a cell, which moves without drawing the picture anew.
function Mark({ window, cell }) {
  const share = (value) => `${100 * value}%`;
  return <div class="mark" style={{
    left: share((cell.column - window.column) / window.columns), top: share((cell.row - window.row) / window.rows),
    width: share(1 / window.columns), height: share(1 / window.rows),
  }} />;
}

// A small picture without controls, of one head.
export function Thumbnail({ matrix, limits, label, isChosen, onChoose }) {
  const canvas = useRef(null);
  useLayoutEffect(() => {
    if (!matrix) return;
    canvas.current.width = canvas.current.height = 96;
    draw(canvas.current, [matrix], WHOLE(matrix), { limits: limits ?? range(matrix.values), isSquareRoot: true });
  }, [matrix]);
  return (
    <button class={isChosen ? "thumbnail chosen" : "thumbnail"} onClick={onChoose} title={label} aria-pressed={isChosen}>
      <canvas ref={canvas} />
      <span>{label}</span>
    </button>
  );
}

// --- export -------------------------------------------------------------------------------------

// Buttons that save the picture with a test id.
export function Saves({ of, title, rows, columns }) {
  const canvas = () => document.querySelector(`[data-testid=${of}]`);
  return (
    <>
      <button onClick={() => canvas().toBlob((blob) => save(blob, `${title}.png`))}>PNG</button>
      <button onClick={() => saveSvg(canvas(), title, { title, rows, columns })}>SVG</button>
    </>
  );
}

// The picture, with its title and the names of its axes as text.
function saveSvg(canvas, name, { title, rows, columns }) {
  const [width, height] = [canvas.width, canvas.height];
  const text = (content, x, y, more = "") => `<text x="${x}" y="${y}" font-family="sans-serif" font-size="16"${more}>${escaped(content)}</text>`;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width + 40}" height="${height + 70}">` +
    text(title, 40, 20) + `<image x="40" y="30" width="${width}" height="${height}" href="${canvas.toDataURL("image/png")}"/>` +
    text(columns, 40 + width / 2, height + 55, ' text-anchor="middle"') +
    text(rows, 20, 30 + height / 2, ` text-anchor="middle" transform="rotate(-90 20 ${30 + height / 2})"`) + "</svg>";
  save(new Blob([svg], { type: "image/svg+xml" }), `${name}.svg`);
}

function escaped(text) {
  return text.replace(/[&<>]/g, (each) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[each]).replace(/[\u0000-\u0008\u000b-\u001f]/g, "");
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
