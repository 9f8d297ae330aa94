// Threads beside the page, which do what worker.js can; the least busy one is asked.

import { ViewError } from "./bytes.js";

const threads = [];

function start() {
  const count = Math.max(1, Math.min(4, navigator.hardwareConcurrency ?? 2));
  for (let number = 0; number < count; number += 1) {
    const thread = { worker: new Worker(new URL("worker.js", document.querySelector("script[src]").src)), waiting: new Map(), next: 0 };
    thread.worker.onmessage = ({ data: { id, value, problem } }) => {
      const { resolve, reject } = thread.waiting.get(id);
      thread.waiting.delete(id);
      if (problem === undefined) resolve(value);
      else reject(new ViewError(problem));
    };
    thread.worker.onerror = () => {
      for (const { reject } of thread.waiting.values()) reject(new ViewError("the server does not give worker.js, which lies beside this page"));
      thread.waiting.clear();
    };
    threads.push(thread);
  }
}

// `given` is copied to the thread, but for the buffers in `moved`.
export function inThread(task, given, moved = []) {
  if (!threads.length) start();
  const thread = threads.reduce((one, other) => (other.waiting.size < one.waiting.size ? other : one));
  return new Promise((resolve, reject) => {
    const id = thread.next++;
    thread.waiting.set(id, { resolve, reject });
    thread.worker.postMessage({ id, task, ...given }, moved);
  });
}
