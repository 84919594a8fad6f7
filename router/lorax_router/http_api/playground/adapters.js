// The adapters that the server knows: where each stands, why, and what may be done with it.

import { byId, bytes, counted, make, say } from './dom.js';
import { get, post } from './api.js';
import { offer, onEnter } from './compare.js';

const MEANINGS = {
  resolving: 'being found, fetched and verified',
  refused: 'cannot be served',
  failed: 'a later try may succeed',
  absent: 'known, not in the device’s memory',
  preparing: 'on its way to the device',
  resident: 'ready for the next step',
  draining: 'makes room for another',
  releasing: 'its memory is being freed',
  retiring: 'serves those who began with it',
};

let rights = { may_manage: false, may_pin: false, has_key: false };

/** Prepare the view. */
export function start() {
  byId('load').addEventListener('click', load);
  onEnter(byId('load-id'), load);
}

/** Take what the caller may do. */
export function allow(found) {
  rights = found;
  byId('loading').hidden = !rights.may_manage;
  const where = rights.has_key
    ? 'This key may look. Adapters are managed with an admin key.'
    : 'This server has no keys, so adapters are managed on a listener of their own, and not by a page. ' +
      'With --admin-api-key they can be managed here.';
  say(byId('no-managing'), rights.may_manage ? '' : where);
}

/** Ask for the list anew, with the focus where it was. */
export async function refresh() {
  const { adapters } = await get('v1/adapters?limit=200');
  const list = byId('adapter-list');
  const focused = document.activeElement && document.activeElement.dataset.act;
  list.replaceChildren(...adapters.map(card));
  if (!adapters.length) {
    list.append(make('li', { className: 'quiet' }, 'None yet: an adapter is known once somebody asks for it.'));
  }
  if (focused) {
    const again = [...list.querySelectorAll('button')].find((each) => each.dataset.act === focused);
    if (again) again.focus();
  }
}

const idOf = (adapter) =>
  adapter.revision ? `${adapter.adapter_id}@${adapter.revision}` : adapter.adapter_id;

const modelOf = (adapter) =>
  adapter.adapter_source === 'alias' ? adapter.adapter_id : `${adapter.adapter_source}:${idOf(adapter)}`;

function card(adapter) {
  const reason = adapter.failure && `${adapter.failure.text} (${adapter.failure.reason})`;
  const facts = [
    adapter.alias_of && ['Stands for', adapter.alias_of],
    adapter.rank && ['Rank', adapter.rank],
    ['On the device', bytes(adapter.bytes.device)],
    ['Requests', `${adapter.running} run, ${adapter.waiting} wait`],
    ['Used', counted(adapter.uses, 'time')],
  ].filter(Boolean);
  return make(
    'li',
    { className: 'box adapter' },
    make(
      'header',
      {},
      make('h3', {}, modelOf(adapter)),
      make('span', { className: `badge is-${adapter.state}` }, adapter.state),
      adapter.pinned ? make('span', { className: 'badge is-pinned' }, 'pinned') : null,
    ),
    make('p', { className: 'quiet' }, MEANINGS[adapter.state] || ''),
    reason ? make('p', { className: 'fault' }, reason) : null,
    ...adapter.warnings.map((each) => make('p', { className: 'warning' }, each)),
    make('dl', { className: 'facts' }, ...facts.map(fact)),
    make('div', { className: 'row wrap' }, ...actions(adapter)),
  );
}

const fact = ([name, value]) => make('div', {}, make('dt', {}, name), make('dd', {}, value));

function actions(adapter) {
  const offered = [];
  const isThere = adapter.state === 'resident';
  if (rights.may_manage && !isThere) offered.push(['load', 'Load']);
  if (rights.may_pin && isThere) offered.push(adapter.pinned ? ['unpin', 'Unpin'] : ['pin', 'Pin']);
  if (rights.may_manage && isThere) offered.push(['unload', 'Unload']);
  const buttons = offered.map(([verb, name]) => button(adapter, verb, name));
  const compare = make('button', { type: 'button' }, 'Compare');
  compare.dataset.act = `compare ${modelOf(adapter)}`;
  compare.setAttribute('aria-label', `Compare ${modelOf(adapter)}`);
  compare.addEventListener('click', () => {
    offer(modelOf(adapter), false, true);
    byId('tab-compare').click();
  });
  return adapter.failure ? buttons : [...buttons, compare];
}

function button(adapter, verb, name) {
  const made = make('button', { type: 'button' }, name);
  made.dataset.act = `${verb} ${modelOf(adapter)}`;
  made.setAttribute('aria-label', `${name} ${modelOf(adapter)}`);
  made.addEventListener('click', () => {
    made.disabled = true;
    manage(verb, { adapter_id: idOf(adapter), adapter_source: adapter.adapter_source }, modelOf(adapter));
  });
  return made;
}

async function load() {
  const id = byId('load-id').value.trim();
  if (!id) return;
  const body = { adapter_id: id, pin: byId('load-pin').checked };
  if (byId('load-source').value) body.adapter_source = byId('load-source').value;
  await manage('load', body, id);
}

const DONE = { load: 'is loaded', unload: 'is unloaded', pin: 'stays', unpin: 'may be evicted' };

async function manage(verb, body, name) {
  say(byId('managed-fault'), '');
  say(byId('managed'), `${name}: asking the server…`);
  try {
    await post(`v1/adapters/${verb}`, body);
    say(byId('managed'), `${name} ${DONE[verb]}.`);
  } catch (error) {
    say(byId('managed'), '');
    say(byId('managed-fault'), error.message);
  }
  await refresh();
}
