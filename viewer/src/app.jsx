// The page: which archives there are, which one is shown, and how.

import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { useAddress } from "./address.js";
import { Archive, nameOf } from "./archive.js";
import { ArchiveView } from "./archiveView.jsx";
import { AttentionView, useKeys } from "./attentionView.jsx";
import { ViewError } from "./bytes.js";
import { CompareView } from "./compareView.jsx";
import { Choice, Loaded, Problem, Text, useLoaded } from "./parts.jsx";
import { SampleView } from "./sampleView.jsx";

const VIEWS = [["archive", "archive"], ["sample", "sample"], ["attention", "attention"], ["compare", "compare"]];

// Archives of the address (?archive=URL, several times), else those beside this page.
async function listed() {
  const named = new URLSearchParams(location.search).getAll("archive");
  if (named.length) return named.map((url) => ({ url: new URL(url, location.href).href }));
  const response = await fetch("archives.json").catch(() => null);
  if (!response?.ok) {
    throw new ViewError("no archive is named: open this page with ?archive=https://server/archive.h5 behind its address, or run 'h5traces view ARCHIVE'");
  }
  const { archives } = await response.json();
  const absolute = (url) => url && new URL(url, location.href).href;
  return archives.map(({ url, labels, checks, scores = [], ...more }) => ({
    url: absolute(url), labels: absolute(labels), checks: absolute(checks), scores: scores.map((each) => ({ ...each, url: absolute(each.url) })), ...more,
  }));
}

function App() {
  const [place, go] = useAddress();
  const archives = useLoaded(async () => {
    const found = await listed();
    if (!found.length) throw new ViewError("there are no archives to show");
    // Each is opened when it is shown, so that a damaged one does not hide the others.
    return found.map(({ url, ...beside }) => {
      let opened = null;
      return { name: beside.name ?? nameOf(url), open: () => (opened ??= Archive.open(url, beside)) };
    });
  }, []);
  useEffect(() => {
    const first = archives.value?.[place.archive ?? 0];
    document.title = first ? `${first.name} – h5traces` : "h5traces";
  }, [archives.value, place.archive]);
  return (
    <Loaded state={archives} waiting="opening …">
      {(found) => <Shown archives={found} place={place} go={go} />}
    </Loaded>
  );
}

function Shown({ archives, place, go }) {
  const number = Math.max(0, Math.min(place.archive ?? 0, archives.length - 1));
  const archive = useLoaded(() => archives[number].open(), [number]);
  const choice = archives.length > 1
    ? <Choice label="archive" value={String(number)} options={archives.map((each, at) => [String(at), each.name])} onChange={(value) => go({ archive: Number(value), sample: 0, token: undefined })} />
    : <Text most={80}>{archives[number].name}</Text>;
  return archive.value
    ? <Opened key={number} {...{ archives, archive: archive.value, choice, place, go }} />
    : <><header><strong>h5traces</strong>{choice}</header><main>{archive.error ? <Problem error={archive.error} /> : <p class="waiting">opening …</p>}</main></>;
}

function Opened({ archives, archive, choice, place, go }) {
  const view = VIEWS.some(([key]) => key === place.view) ? place.view : "archive";
  const sampleNumber = Math.max(0, Math.min(place.sample ?? 0, archive.numSamples - 1));
  const moved = (by) => view !== "archive" && go({ sample: Math.max(0, Math.min(archive.numSamples - 1, sampleNumber + by)), token: undefined }, false);
  useKeys({ j: () => moved(1), k: () => moved(-1), Escape: () => go({ view: "archive" }) });
  const sample = useLoaded(() => (view === "archive" || !archive.numSamples ? null : archive.sample(sampleNumber)), [archive, sampleNumber, view === "archive"]);
  return (
    <>
      <header>
        <strong>h5traces</strong>
        {choice}
        <nav>{VIEWS.map(([key, title]) => <button aria-current={key === view ? "page" : undefined} onClick={() => go({ view: key })}>{title}</button>)}</nav>
        {view === "archive" ? null : (
          <span class="choice">
            <button onClick={() => moved(-1)} aria-label="sample before" title="k">‹</button>
            sample {sampleNumber} of {archive.numSamples}
            <button onClick={() => moved(1)} aria-label="next sample" title="j">›</button>
          </span>
        )}
      </header>
      <main>
        {archive.numSamples === 0 ? <p class="note">This archive holds no samples.</p>
          : view === "archive" ? <ArchiveView archive={archive} place={place} go={go} />
          : <Loaded state={sample}>{(found) => !found ? null
            : view === "sample" ? <SampleView sample={found} place={place} go={go} />
            : view === "attention" ? <AttentionView sample={found} place={place} go={go} />
            : <CompareView archives={archives} sample={found} place={place} go={go} />}</Loaded>}
      </main>
    </>
  );
}

render(<App />, document.getElementById("app"));
