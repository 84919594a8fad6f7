// Drawings of the live view. Each says in words what it shows.

import { draw, short } from './dom.js';

const NUM_COLOURS = 8;
const COLUMNS = 32;
const CELL = 10;

/** Return what gives each name a colour, the same one as long as the page is open. */
export function colours() {
  const known = new Map();
  return (name) => {
    if (!known.has(name)) known.set(name, `group-${known.size % NUM_COLOURS}`);
    return known.get(name);
  };
}

/** Rates of the last readings. */
export class History {
  constructor(length) {
    this.length = length;
    this.readings = [];
    this._before = null;
  }

  /** Take a reading; one of another server begins anew. */
  add(live) {
    const before = this._before;
    this._before = live;
    if (!before || live.seconds <= before.seconds || live.steps < before.steps) return;
    const seconds = live.seconds - before.seconds;
    this.readings.push({
      steps: (live.steps - before.steps) / seconds,
      tokens: Math.max(0, live.generated_tokens - before.generated_tokens) / seconds,
    });
    if (this.readings.length > this.length) this.readings.shift();
  }

  get last() {
    return this.readings[this.readings.length - 1] || { steps: NaN, tokens: NaN };
  }
}

/** A square for each place in the batch, those that are taken in the colour of their adapter. */
export function squares(live, colour) {
  const most = Math.min(live.rows.most, 256);
  const height = Math.ceil(most / COLUMNS) * CELL;
  const drawing = draw('svg', {
    viewBox: `0 0 ${COLUMNS * CELL} ${height}`,
    class: 'squares',
    role: 'img',
    'aria-label': `${live.rows.running} of ${live.rows.most} places are taken`,
  });
  const taken = live.groups.flatMap((each) => Array(each.running).fill(colour(each)));
  for (let place = 0; place < most; place += 1) {
    drawing.append(
      draw('rect', {
        x: (place % COLUMNS) * CELL + 1,
        y: Math.floor(place / COLUMNS) * CELL + 1,
        width: CELL - 2,
        height: CELL - 2,
        rx: 2,
        class: `fill-${taken[place] || 'free'}`,
      }),
    );
  }
  return drawing;
}

/** How the KV blocks are shared out. */
export function blockBar(kv) {
  const parts = [['used', kv.used], ['cached', kv.cached], ['free', kv.blocks - kv.used - kv.cached]];
  const drawing = draw('svg', {
    viewBox: '0 0 320 16',
    preserveAspectRatio: 'none',
    class: 'block-bar',
    role: 'img',
    'aria-label': `${kv.used} blocks in use, ${kv.cached} cached, of ${kv.blocks}`,
  });
  let start = 0;
  for (const [kind, count] of parts) {
    const width = (320 * count) / Math.max(kv.blocks, 1);
    drawing.append(draw('rect', { x: start, y: 0, width, height: 16, class: `fill-${kind}` }));
    start += width;
  }
  return drawing;
}

/** A rate over the last readings. */
export function line(history, name, title) {
  const values = history.readings.map((each) => each[name]);
  const highest = Math.max(1, ...values);
  const step = 320 / (history.length - 1);
  const first = 320 - (values.length - 1) * step;
  const points = values.map((value, place) => `${short(first + place * step, 1)},${short(58 - (54 * value) / highest, 1)}`);
  return draw(
    'svg',
    {
      viewBox: '0 0 320 60',
      preserveAspectRatio: 'none',
      class: 'line',
      role: 'img',
      'aria-label': `${title}: now ${short(history.last[name])}, at most ${short(highest)}`,
    },
    draw('line', { x1: 0, y1: 58, x2: 320, y2: 58, class: 'axis' }),
    draw('polyline', { points: points.join(' '), class: 'curve' }),
  );
}
