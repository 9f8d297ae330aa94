// What is shown stands in the address, behind #, so that a link shows what was meant:
// #archive=0&sample=3&view=attention&layer=5&head=2&token=10

import { useEffect, useState } from "preact/hooks";

const NUMBERS = new Set(["archive", "sample", "layer", "head", "token", "otherArchive", "otherSample", "otherLayer"]);

export function parse(hash) {
  const found = {};
  for (const [key, value] of new URLSearchParams(hash.replace(/^#/, ""))) {
    found[key] = NUMBERS.has(key) && /^-?\d+$/.test(value) ? Number(value) : value;
  }
  return found;
}

export function write(place) {
  const kept = Object.entries(place).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return `#${new URLSearchParams(kept.map(([key, value]) => [key, String(value)]))}`;
}

export function useAddress() {
  const [place, setPlace] = useState(() => parse(location.hash));
  useEffect(() => {
    const changed = () => setPlace(parse(location.hash));
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  // A change of what is pointed at is no step of the history.
  const go = (changes, isStep = true) => {
    const next = write({ ...place, ...changes });
    if (next === location.hash) return;
    if (isStep) {
      location.hash = next;
    } else {
      history.replaceState(null, "", next);
      setPlace(parse(next));
    }
  };
  return [place, go];
}
