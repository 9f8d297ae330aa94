// Small parts of the page.

import { useEffect, useState } from "preact/hooks";
import { ViewError } from "./bytes.js";

// What a promise gives: {value}, {error}, or {} while it is awaited; `make` runs when `inputs` change,
// and is told by a function whether its value is still wanted.
export function useLoaded(make, inputs) {
  const [state, setState] = useState({});
  useEffect(() => {
    let isCurrent = true;
    setState((before) => ({ stale: before.value ?? before.stale }));
    Promise.resolve()
      .then(() => make(() => isCurrent))
      .then((value) => isCurrent && setState({ value }), (error) => isCurrent && setState({ error }));
    return () => { isCurrent = false; };
  }, inputs);
  return state;
}

export function Problem({ error }) {
  if (!(error instanceof ViewError)) console.error(error);
  const text = error instanceof ViewError ? error.message : `this page met an error of its own: ${error.message}`;
  return <p class="problem" role="alert">{text}</p>;
}

// A value as soon as it is there; the one before it meanwhile.
export function Loaded({ state, children, waiting = "reading …" }) {
  if (state.error) return <Problem error={state.error} />;
  if (state.value !== undefined) return children(state.value);
  return state.stale !== undefined ? <div class="stale">{children(state.stale)}</div> : <p class="waiting">{waiting}</p>;
}

// Text of a file, never markup: direction marks stay inside, control characters are shown.
export function Text({ children, most = Infinity }) {
  const whole = String(children ?? "");
  const shown = visible(whole.length > most ? `${whole.slice(0, most)}…` : whole);
  return <bdi title={whole.length > most ? visible(whole.slice(0, 2000)) : undefined}>{shown}</bdi>;
}

export function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]/gu,
    (each) => `\\u${each.codePointAt(0).toString(16).padStart(4, "0")}`);
}

export function Choice({ label, value, options, onChange }) {
  return (
    <label class="choice">
      <span>{label}</span>
      <select value={value} onChange={(event) => onChange(event.currentTarget.value)}>
        {options.map(([key, text]) => <option key={key} value={key}>{text}</option>)}
      </select>
    </label>
  );
}

export function Facts({ of }) {
  const kept = Object.entries(of).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return (
    <dl class="facts">
      {kept.map(([name, value]) => <><dt>{name}</dt><dd><Text most={500}>{value}</Text></dd></>)}
    </dl>
  );
}

export const short = (value) => (value === null || Number.isNaN(value) ? "–" : Number(value.toPrecision(4)).toString());

export function Legend({ limits, palette, isSquareRoot }) {
  const stops = palette.filter((_, number) => number % 15 === 0).map((each) => `rgb(${each.join(" ")})`);
  return (
    <span class="legend" title={isSquareRoot ? "colours follow the square root" : undefined}>
      {short(limits[0])}<span class="bar" style={{ background: `linear-gradient(90deg, ${stops.join(", ")})` }} />{short(limits[1])}
    </span>
  );
}
