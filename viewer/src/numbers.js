// Quantities of tokens and layers, from arrays in C order. Definitions are those of
// 'h5traces features'; positions without a value are NaN.

// 2-norm of every row of states (tokens, hidden).
export function norms({ shape: [tokens, hidden], values }) {
  return byRow(tokens, (row) => {
    let sum = 0;
    for (let at = row * hidden, stop = at + hidden; at < stop; at += 1) sum += values[at] * values[at];
    return Math.sqrt(sum);
  });
}

// 2-norm of the difference of every row from that of another layer.
export function changes({ shape: [tokens, hidden], values }, before) {
  return byRow(tokens, (row) => {
    let sum = 0;
    for (let at = row * hidden, stop = at + hidden; at < stop; at += 1) sum += (values[at] - before.values[at]) ** 2;
    return Math.sqrt(sum);
  });
}

// Cosine of every row with that of another layer.
export function cosines({ shape: [tokens, hidden], values }, other) {
  return byRow(tokens, (row) => {
    let [dot, one, two] = [0, 0, 0];
    for (let at = row * hidden, stop = at + hidden; at < stop; at += 1) {
      dot += values[at] * other.values[at];
      one += values[at] * values[at];
      two += other.values[at] * other.values[at];
    }
    return dot / Math.sqrt(one * two);
  });
}

// Product of every row with weights, plus an intercept, which is behind the weights.
export function projections({ shape: [tokens, hidden], values }, direction) {
  return byRow(tokens, (row) => {
    let sum = direction[hidden];
    for (let channel = 0, at = row * hidden; channel < hidden; channel += 1, at += 1) sum += values[at] * direction[channel];
    return sum;
  });
}

// Entropy of every query's weights in nats, rows scaled to sum to 1; mean over heads.
export function entropies(attention) {
  return overHeads(attention, (values, start, keys) => {
    let [sum, logs] = [0, 0];
    for (let at = start, stop = start + keys; at < stop; at += 1) {
      const weight = values[at];
      sum += weight;
      if (weight > 0) logs += weight * Math.log(weight);
    }
    return Math.log(sum) - logs / sum;
  });
}

// Share of every query's weights on the first token; mean over heads. The first query sees nothing else.
export function sinkMasses(attention) {
  return overHeads(attention, (values, start, keys, query, firstQuery) => {
    if (query === 0 && firstQuery === 0) return NaN;
    let sum = 0;
    for (let at = start, stop = start + keys; at < stop; at += 1) sum += values[at];
    return values[start] / sum;
  });
}

// Mean weight of a token of the prompt, divided by that plus the mean weight of a token of the answer
// up to the query (Chuang et al., Lookback Lens, EMNLP 2024); of tokens of the answer, mean over heads.
export function lookbacks(attention, promptLen) {
  return overHeads(attention, (values, start, keys, query, firstQuery) => {
    const position = query + firstQuery;
    if (!(promptLen > 0) || position < promptLen || promptLen >= keys) return NaN;
    let [context, answer] = [0, 0];
    for (let key = 0; key < promptLen; key += 1) context += values[start + key];
    for (let key = promptLen; key < keys; key += 1) answer += values[start + key];
    context /= promptLen;
    answer /= position - promptLen + 1;
    return context / (context + answer);
  });
}

export function range(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low && value !== -Infinity) low = value;
    if (value > high && value !== Infinity) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

// From 0 to a weight that few exceed: the 99.5th percentile of weights that are not 0, without the first
// key, of at most some 20,000.
export function weightRange({ columns, values }) {
  const stride = Math.max(1, Math.floor(values.length / 40_000)) | 1;
  const found = [];
  for (let at = 0; at < values.length; at += stride) if (values[at] > 0 && at % columns) found.push(values[at]);
  found.sort((one, other) => one - other);
  return [0, found.length ? found[Math.floor(0.995 * (found.length - 1))] : Math.max(1e-6, range(values)[1])];
}

// From the 1st to the 99th percentile, of at most some 20,000 values: massive activations of single
// tokens would leave all others dark.
export function usualRange(values) {
  const stride = Math.max(1, Math.floor(values.length / 20_000));
  const found = values.filter((value, at) => at % stride === 0 && Number.isFinite(value)).sort();
  if (!found.length) return [0, 1];
  const at = (share) => found[Math.round(share * (found.length - 1))];
  return at(0.01) < at(0.99) ? [at(0.01), at(0.99)] : range(values);
}

function byRow(count, value) {
  return Float32Array.from({ length: count }, (_, row) => value(row));
}

function overHeads({ shape, values }, value) {
  const [heads, queries, keys] = shape.length === 2 ? [1, ...shape] : shape;
  return byRow(queries, (query) => {
    let sum = 0;
    for (let head = 0; head < heads; head += 1) sum += value(values, (head * queries + query) * keys, keys, query, keys - queries);
    return sum / heads;
  });
}
