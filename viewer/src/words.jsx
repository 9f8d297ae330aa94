// Tokens as the text they make; prompt and answer are told apart.

import { useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { amounts, css, inkOn, scaled } from "./colours.js";
import { short, visible } from "./parts.jsx";

const MOST = 5000;
// Between two paintings, so that the pointer is not waited for.
const PAUSE_MS = 100;

// Thousands of tokens change their colours while the pointer moves, so the elements are made once, and
// only those in sight are coloured.
export function Words({ words, values, limits = [0, 1], palette = amounts, promptLen, chosen, onChoose, isSquareRoot }) {
  const box = useRef(null);
  const spans = useMemo(() => words.slice(0, MOST).map((word, number) => (
    <span key={number} data-n={number} class={promptLen > number ? "prompt" : "answer"}>
      <bdi>{visible(word.length > 200 ? `${word.slice(0, 200)}…` : word).replace(/\n/g, "⏎\n")}</bdi>
    </span>
  )), [words, promptLen]);
  const value = (number) => (values && number < values.length ? values[number] : NaN);
  const paint = () => {
    const { children, scrollTop, clientHeight } = box.current;
    const place = scaled(limits, isSquareRoot);
    let [first, stop] = [0, spans.length];
    while (first < stop) {
      const middle = (first + stop) >> 1;
      if (children[middle].offsetTop + children[middle].offsetHeight < scrollTop) first = middle + 1;
      else stop = middle;
    }
    const seen = [];
    for (let at = first; at < spans.length && children[at].offsetTop < scrollTop + clientHeight; at += 1) seen.push(children[at]);
    seen.forEach((span, at) => {
      const found = place(value(first + at));
      span.style.background = found === null ? "" : css(palette[found]);
      span.style.color = found === null ? "" : inkOn(palette[found]);
      span.classList.toggle("chosen", first + at === chosen);
    });
  };
  const last = useRef(0);
  useLayoutEffect(() => {
    const rest = last.current + PAUSE_MS - performance.now();
    const now = () => { last.current = performance.now(); paint(); };
    if (rest <= 0) { now(); return undefined; }
    const timer = setTimeout(now, rest);
    return () => clearTimeout(timer);
  });
  const number = (event) => Number(event.target.closest("[data-n]")?.dataset.n ?? NaN);
  return (
    <p class="words" data-testid="words" ref={box} onScroll={paint}
      onClick={(event) => { const at = number(event); if (at >= 0) onChoose?.(at); }}
      onMouseOver={(event) => { const at = number(event); if (at >= 0) event.target.closest("[data-n]").title = `${at}${Number.isNaN(value(at)) ? "" : `: ${short(value(at))}`}`; }}>
      {spans}
      {words.length > MOST ? <span class="note"> and {words.length - MOST} more tokens</span> : null}
    </p>
  );
}
