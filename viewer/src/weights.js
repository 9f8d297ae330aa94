// Attention weights of queries and keys: section 20 of schema/SPEC.md.

// `queries` and `keys` are (heads, tokens, width); one head of keys serves several of the queries where
// there are fewer. Returns (heads, tokens, tokens).
export function weights({ queries, keys, heads, tokens, width, keyHeads, rule }) {
  const { scale, soft_cap: cap, window, mask, slopes, sinks } = rule;
  const found = new Float32Array(heads * tokens * tokens);
  for (let head = 0; head < heads; head += 1) {
    const keyStart = keyHeads[head] * tokens * width;
    for (let query = 0; query < tokens; query += 1) {
      const last = mask === "all" ? tokens - 1 : query;
      const first = mask === "window" ? Math.max(0, query - window + 1) : mask === "chunk" ? query - (query % window) : 0;
      const row = (head * tokens + query) * tokens;
      const from = (head * tokens + query) * width;
      let top = sinks ? sinks[head] : -Infinity;
      for (let key = first; key <= last; key += 1) {
        let score = 0;
        for (let at = 0, to = keyStart + key * width; at < width; at += 1) score += queries[from + at] * keys[to + at];
        score *= scale;
        if (cap) score = cap * Math.tanh(score / cap);
        if (slopes) score += slopes[head] * (key - query);
        found[row + key] = score;
        if (score > top) top = score;
      }
      let sum = sinks ? Math.exp(sinks[head] - top) : 0;
      for (let key = first; key <= last; key += 1) sum += found[row + key] = Math.exp(found[row + key] - top);
      for (let key = first; key <= last; key += 1) found[row + key] /= sum;
    }
  }
  return found;
}
