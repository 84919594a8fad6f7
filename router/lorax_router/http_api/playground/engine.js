// What the engine does now: numbers, drawings, and a sentence for each that says what it means.

import { byId, bytes, counted, draw, make, short } from './dom.js';
import { History, blockBar, colours, line, squares } from './charts.js';

const history = new History(60);
const colourOf = colours();
const boxes = new Map();

const BATCH =
  'Each square is a request. A step computes a token for each of them, whatever its adapter, and a part of ' +
  'the prompts of those who just came. Whoever is done leaves at once, and who waits takes the place in the next step.';
const QUEUE =
  'Requests that wait for their first step, or gave way when memory ran out and will go on where they stood. ' +
  'With a batch of fixed size all of them would wait for the slowest one that runs.';
const SPEED =
  'How often the server decides who is computed next. A step with many rows takes far less time than ' +
  'as many steps with one: the weights are read once for all of them, which is why batches pay.';
const BLOCKS =
  'What was computed of prompts and answers is kept in blocks of a few tokens. They are granted as tokens come, not ' +
  'reserved, so more requests fit. Cached blocks are free to be taken, and until then save work for prompts that begin alike.';
const PREFIX =
  'Of all tokens that came in, those that were in the cache and not computed again: earlier turns of a ' +
  'chat, and beginnings that requests share.';
const SLOTS =
  'Adapters in the device’s memory, ready for the next step. Others are fetched when somebody asks for them; the least ' +
  'worth of those that nobody needs make room. Requests of others do not wait for that.';

/** Show a document of the present. */
export function show(live) {
  history.add(live);
  const colour = (group) => (group.is_others ? 'others' : colourOf(group.adapter || 'private'));
  box('batch', 'The batch', counted(live.rows.running, 'row'), `of at most ${live.rows.most}`, BATCH, [
    squares(live, colour),
    table(live.groups, colour),
  ]);
  box('queue', 'The queue', live.rows.waiting, live.rows.waiting === 1 ? 'waits' : 'wait', QUEUE, [
    note(`${counted(live.rows.preempted, 'time')} a request gave way so far`),
  ]);
  box('speed', 'Steps a second', short(history.last.steps), `${short(history.last.tokens)} tokens a second`, SPEED, [
    line(history, 'steps', 'Steps a second, the last minute'),
  ]);
  const { kv } = live;
  box('blocks', 'KV blocks', kv.used, `of ${kv.blocks} in use, ${kv.tokens_each} tokens each`, BLOCKS, [
    blockBar(kv),
    legend([['used', `${kv.used} in use`], ['cached', `${kv.cached} cached`], ['free', `${kv.blocks - kv.used - kv.cached} empty`]]),
  ]);
  const share = live.prompt_tokens ? (100 * live.cached_tokens) / live.prompt_tokens : 0;
  box('prefix', 'Found in the cache', `${short(share)} %`, `${live.cached_tokens} of ${counted(live.prompt_tokens, 'token')}`, PREFIX, []);
  if (live.adapters) showAdapters(live.adapters);
}

function showAdapters(adapters) {
  const room = adapters.bytes ? `, ${bytes(adapters.bytes_held)} of ${bytes(adapters.bytes)}` : '';
  const named = adapters.in_play.map((each) =>
    make('li', { className: `badge is-${each.state}` },
      `${each.adapter || 'a private adapter'}: ${each.state}${each.pinned ? ', pinned' : ''}`));
  const list = make('ul', { className: 'badges', 'aria-label': 'Adapters in play' }, ...named);
  box('slots', 'Adapters', adapters.slots_held, `of ${adapters.slots} slots${room}`, SLOTS, [list]);
}

/** Fill a box, which is made when it is first there. */
function box(id, title, figure, unit, sentence, drawings) {
  if (!boxes.has(id)) {
    const parts = {
      figure: make('span', { className: 'figure' }),
      unit: make('span', { className: 'unit' }),
      drawings: make('div', { className: 'drawings' }),
    };
    const element = make(
      'section',
      { className: `box number is-${id}`, 'aria-label': title },
      make('h2', {}, title),
      make('p', { className: 'reading' }, parts.figure, ' ', parts.unit),
      parts.drawings,
      make('p', { className: 'quiet' }, sentence),
    );
    boxes.set(id, parts);
    byId('numbers').append(element);
  }
  const parts = boxes.get(id);
  parts.figure.textContent = figure;
  parts.unit.textContent = unit;
  parts.drawings.replaceChildren(...drawings);
}

const note = (text) => make('p', { className: 'unit' }, text);

function legend(entries) {
  const items = entries.map(([kind, text]) =>
    make('li', {}, draw('svg', { class: 'swatch', 'aria-hidden': 'true' }, draw('rect', { width: 12, height: 12, rx: 2, class: `fill-${kind}` })), text));
  return make('ul', { className: 'legend' }, ...items);
}

function nameOf(group) {
  if (group.is_others) return 'others’ requests';
  return group.adapter || 'a private adapter';
}

function table(groups, colour) {
  if (!groups.length) return note('Nobody asks for anything now.');
  const hasTenants = groups.some((each) => each.tenant);
  const heads = ['Adapter', ...(hasTenants ? ['Tenant'] : []), 'Run', 'Wait', 'Blocks'];
  const rows = groups.map((each) => {
    const swatch = draw('svg', { class: 'swatch', 'aria-hidden': 'true' }, draw('rect', { width: 12, height: 12, rx: 2, class: `fill-${colour(each)}` }));
    const first = make('th', { scope: 'row' }, swatch, nameOf(each), each.is_base ? make('span', { className: 'kind' }, 'base') : null);
    const cells = [...(hasTenants ? [each.tenant || '–'] : []), each.running, each.waiting, each.blocks];
    return make('tr', {}, first, ...cells.map((cell) => make('td', {}, String(cell))));
  });
  return make(
    'table',
    {},
    make('caption', { className: 'out-of-sight' }, 'Requests by adapter'),
    make('thead', {}, make('tr', {}, ...heads.map((head) => make('th', { scope: 'col' }, head)))),
    make('tbody', {}, ...rows),
  );
}
