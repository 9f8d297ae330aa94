// The samples of an archive as a table: sort, filter, search; lengths and labels as bars.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { fetchJson } from "./archive.js";
import { Facts, Problem, Text, short, useLoaded } from "./parts.jsx";

const ROW_HEIGHT = 26;
const AT_ONCE = 1000;
// Rows that are read without being asked for.
const READ_AHEAD = 5000;
const QUESTIONS = ["question"];
const ANSWERS = ["generated_answer_clean", "generated_answer", "generated_text"];

// Rows of the index as they come: {rows, numRead, readAll}; rows not read yet are null.
function useRows(archive) {
  const [state, setState] = useState({ rows: [], numRead: 0 });
  const wanted = useRef(0);
  const readAll = useRef(null);
  useEffect(() => {
    let isCurrent = true;
    const rows = new Array(archive.numSamples).fill(null);
    wanted.current = Math.min(archive.numSamples, READ_AHEAD);
    let [numRead, isReading] = [0, false];
    setState({ rows, numRead });
    const go = async () => {
      if (isReading) return;
      isReading = true;
      try {
        while (isCurrent && numRead < wanted.current) {
          const numbers = Array.from({ length: Math.min(AT_ONCE, wanted.current - numRead) }, (_, at) => numRead + at);
          for (const sample of await archive.samples(numbers)) rows[sample.number] = sample;
          numRead += numbers.length;
          if (isCurrent) setState({ rows: rows.slice(), numRead });
        }
      } catch (error) {
        if (isCurrent) setState({ rows: rows.slice(), numRead, error });
      }
      isReading = false;
    };
    readAll.current = () => { wanted.current = archive.numSamples; go(); };
    go();
    return () => { isCurrent = false; };
  }, [archive]);
  return { ...state, readAll: () => readAll.current() };
}

export function ArchiveView({ archive, place, go }) {
  const { rows, numRead, error, readAll } = useRows(archive);
  const [texts, setTexts] = useState(new Map());
  const query = String(place.find ?? "");
  const sort = String(place.sort ?? "");
  const scores = useMemo(() => [...new Set(rows.flatMap((row) => (row ? Object.keys(row.scores) : [])))].sort(), [rows]);
  const columns = {
    index: (number) => number,
    id: (number) => archive.ids[number] ?? "",
    label: (number) => rows[number]?.label ?? null,
    length: (number) => rows[number]?.attrs.seq_len ?? null,
    ...Object.fromEntries(scores.map((name) => [name, (number) => rows[number]?.scores[name] ?? null])),
  };
  const needsAll = (query || sort) && numRead < archive.numSamples;
  const order = useMemo(() => {
    const { conditions, text: lower } = parsed(query, columns);
    const matches = (number) => conditions.every((fits) => fits(number)) &&
      (!lower || String(archive.ids[number] ?? "").toLowerCase().includes(lower) || (texts.get(number) ?? []).some((text) => text.toLowerCase().includes(lower)));
    const found = Array.from({ length: archive.numSamples }, (_, number) => number).filter(matches);
    const key = columns[sort.replace(/^-/, "")];
    if (!key) return found;
    const direction = sort.startsWith("-") ? -1 : 1;
    return found.sort((one, other) => direction * compared(key(one), key(other)) || one - other);
  }, [archive, rows, texts, query, sort]);
  const addTexts = (found) => setTexts((before) => new Map([...before, ...found]));
  return (
    <>
      <Facts of={{
        file: archive.name, samples: archive.numSamples, model: archive.root.model_id, "data set": archive.root.dataset,
        kinds: Object.keys(archive.kinds).join(", "), tier: archive.directory.archive.precision ? "lossy, see the attribute precision" : null,
        format: archive.root.format_version, written: archive.root.created,
      }} />
      <Warnings archive={archive} rows={rows} />
      <Distributions rows={rows} onLabel={(label) => go({ find: `label:${label}` })} />
      <div class="bar-of-controls">
        <input type="search" placeholder="id, text, label:1, length>100" value={query} aria-label="search"
          onInput={(event) => go({ find: event.currentTarget.value || undefined }, false)} />
        <TextSearch archive={archive} texts={texts} addTexts={addTexts} query={parsed(query, columns).text} />
        <span role="status">{order.length} of {archive.numSamples} samples</span>
        {needsAll ? <button onClick={readAll}>read the index of the other {archive.numSamples - numRead} samples</button> : null}
      </div>
      {error ? <Problem error={error} /> : null}
      <Table archive={archive} rows={rows} order={order} columns={columns} scores={scores} sort={sort} texts={texts} addTexts={addTexts} go={go} />
    </>
  );
}

// Conditions on columns, such as label:1 or length>100, and what else is searched for.
function parsed(query, columns) {
  const conditions = [];
  const text = query.replace(/(\S+?)(:|=|<=|>=|<|>)(\S+)/g, (found, name, operator, wanted) => {
    const value = columns[name];
    if (!value) return found;
    const number = Number(wanted);
    const tests = {
      "<": (each) => each < number, ">": (each) => each > number, "<=": (each) => each <= number, ">=": (each) => each >= number,
    };
    const equals = (each) => String(each) === wanted;
    conditions.push((at) => (tests[operator] ? value(at) !== null && tests[operator](value(at)) : equals(value(at) ?? "none")));
    return "";
  });
  return { conditions, text: text.trim().toLowerCase() };
}

function compared(one, other) {
  if (one === null || other === null) return (one === null) - (other === null);
  return typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other));
}

async function textsOf(samples) {
  return Promise.all(samples.map(async (sample) => {
    const names = [QUESTIONS, ANSWERS].map((each) => each.find((name) => sample.has(name)));
    const stored = names.filter(Boolean);
    const found = await sample.arrays(stored);
    return [sample.number, names.map((name) => (name ? found[stored.indexOf(name)].values[0] ?? "" : ""))];
  }));
}

function TextSearch({ archive, texts, addTexts, query }) {
  const [state, setState] = useState(null);
  if (!query || texts.size >= archive.numSamples) return null;
  const read = async () => {
    try {
      for (let start = 0; start < archive.numSamples; start += 200) {
        setState(`${start} of ${archive.numSamples}`);
        const numbers = Array.from({ length: Math.min(200, archive.numSamples - start) }, (_, at) => start + at);
        addTexts(await textsOf(await archive.samples(numbers.filter((number) => !texts.has(number)))));
      }
      setState(null);
    } catch (error) {
      setState(<Problem error={error} />);
    }
  };
  return state === null ? <button onClick={read}>search in all texts</button> : <span role="status">reading texts: {state}</span>;
}

function Table({ archive, rows, order, columns, scores, sort, texts, addTexts, go }) {
  const box = useRef(null);
  const [top, setTop] = useState(0);
  const first = Math.max(0, Math.floor(top / ROW_HEIGHT) - 10);
  const shown = order.slice(first, first + 60);
  const key = shown.join();
  const state = useLoaded(async () => {
    const missing = shown.filter((number) => !texts.has(number));
    if (missing.length) addTexts(await textsOf(await archive.samples(missing)));
    return true;
  }, [key]);
  const header = (name, title = name) => (
    <th aria-sort={sort === name ? "ascending" : sort === `-${name}` ? "descending" : "none"}>
      <button onClick={() => go({ sort: sort === name ? `-${name}` : name }, false)}>{title}{sort === name ? " ↑" : sort === `-${name}` ? " ↓" : ""}</button>
    </th>
  );
  return (
    <>
      {state.error ? <Problem error={state.error} /> : null}
      <div class="table" ref={box} onScroll={() => setTop(box.current.scrollTop)} tabIndex={0}>
        <table data-testid="samples">
          <thead><tr>{header("index", "#")}{header("id")}<th>question</th><th>answer</th>{header("label")}{header("length")}{scores.map((name) => header(name))}</tr></thead>
          <tbody>
            <tr style={{ height: `${first * ROW_HEIGHT}px` }} />
            {shown.map((number) => {
              const [question, answer] = texts.get(number) ?? ["", ""];
              return (
                <tr key={number} onClick={() => go({ view: "sample", sample: number, find: undefined, sort: undefined })} tabIndex={0}
                  onKeyDown={(event) => { if (event.key === "Enter") go({ view: "sample", sample: number }); }}>
                  <td>{number}</td><td><Text most={60}>{archive.ids[number] ?? "–"}</Text></td>
                  <td><Text most={160}>{question}</Text></td><td><Text most={160}>{answer}</Text></td>
                  <td>{columns.label(number) ?? "–"}</td><td>{columns.length(number) ?? "…"}</td>
                  {scores.map((name) => <td>{columns[name](number) === null ? "–" : short(columns[name](number))}</td>)}
                </tr>
              );
            })}
            <tr style={{ height: `${Math.max(0, order.length - first - shown.length) * ROW_HEIGHT}px` }} />
          </tbody>
        </table>
      </div>
    </>
  );
}

// What the index says of all samples that were read, and what the checks found in the first of them.
function Warnings({ archive, rows }) {
  const checks = useLoaded(() => (archive.beside.checks ? fetchJson(archive.beside.checks) : []), [archive]);
  const found = useMemo(() => counted(rows.filter(Boolean)), [rows]);
  if (checks.error) return <Problem error={checks.error} />;
  if (!found.length && !checks.value?.length) return null;
  return (
    <details class="warnings" open data-testid="warnings">
      <summary>warnings of the checks: {found.length + (checks.value?.length ?? 0)}</summary>
      <ul>
        {found.map(([text, numbers]) => <li>{text}: {numbers.length === 1 ? "sample" : "samples"} {numbers.slice(0, 5).join(", ")}{numbers.length > 5 ? ` and ${numbers.length - 5} more` : ""}</li>)}
        {(checks.value ?? []).map((text) => <li><Text>{text}</Text></li>)}
      </ul>
    </details>
  );
}

const COVERAGES = {
  partial: "arrays do not fit the tokens", last_position: "arrays hold one position only", steps: "arrays are generation steps, which this page does not show", empty: "there are no arrays",
};
const COUNTS = { num_nan: "values are NaN", num_inf: "values are infinite", num_overflow: "values were too large for the stored type" };

function counted(samples) {
  const found = new Map();
  const add = (text, { number }) => (found.has(text) ? found.get(text).push(number) : found.set(text, [number]));
  for (const sample of samples) {
    if (COVERAGES[sample.attrs.coverage]) add(COVERAGES[sample.attrs.coverage], sample);
    for (const [name, text] of Object.entries(COUNTS)) {
      if ([...sample.objects.values()].some(({ attrs }) => attrs[name])) add(text, sample);
    }
  }
  return [...found];
}

function Distributions({ rows, onLabel }) {
  const read = rows.filter(Boolean);
  if (!read.length) return null;
  const lengths = read.map((row) => row.attrs.seq_len);
  const [low, high] = [Math.min(...sampled(lengths)), Math.max(...sampled(lengths))];
  const bins = new Array(Math.min(30, high - low + 1)).fill(0);
  for (const length of lengths) bins[Math.min(bins.length - 1, Math.max(0, Math.floor(((length - low) / (high - low + 1)) * bins.length)))] += 1;
  const labels = new Map();
  for (const row of read) labels.set(row.label ?? "none", (labels.get(row.label ?? "none") ?? 0) + 1);
  const most = Math.max(...bins);
  return (
    <div class="distributions">
      <figure>
        <svg viewBox={`0 0 ${bins.length * 8} 44`} role="img" aria-label={`lengths from ${low} to ${high} tokens`}>
          {bins.map((count, number) => <rect x={number * 8} y={42 - (40 * count) / most} width="7" height={(40 * count) / most}><title>{count}</title></rect>)}
        </svg>
        <figcaption>lengths: {low} to {high} tokens</figcaption>
      </figure>
      <figure>
        {[...labels].sort().map(([label, count]) => <button class="label" onClick={() => onLabel(label)}>label {String(label)}: {count}</button>)}
        <figcaption>{read.length} samples read</figcaption>
      </figure>
    </div>
  );
}

// Math.min takes no more than some 100,000 arguments.
function sampled(values) {
  return values.length <= 50_000 ? values : [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
}
