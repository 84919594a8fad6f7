// The page: its views, its key, and when the server is asked.

import { byId, say } from './dom.js';
import { get, hasKey, setKey } from './api.js';
import * as adapters from './adapters.js';
import * as compare from './compare.js';
import * as engine from './engine.js';

const VIEWS = ['compare', 'adapters', 'engine'];
const LIVE_MS = 1000;
// Lists are asked for less often than what changes with each step.
const LIVE_PER_LIST = 3;

let view = 'compare';
let isKnown = false;
let needsKey = false;
let keysUsed = 0;
let num = 0;

function open(name, isByKey = false) {
  view = name;
  for (const each of VIEWS) {
    const tab = byId(`tab-${each}`);
    tab.setAttribute('aria-selected', String(each === name));
    tab.tabIndex = each === name ? 0 : -1;
    byId(each).hidden = each !== name;
    if (each === name && isByKey) tab.focus();
  }
  history.replaceState(null, '', `#${name}`);
  num = 0;
  refresh();
}

function moveBetweenTabs(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1 };
  const place = VIEWS.indexOf(view);
  if (event.key in steps) open(VIEWS[(place + steps[event.key] + VIEWS.length) % VIEWS.length], true);
  else if (event.key === 'Home') open(VIEWS[0], true);
  else if (event.key === 'End') open(VIEWS[VIEWS.length - 1], true);
  else return;
  event.preventDefault();
}

/** Ask for what the open view shows. */
async function refresh() {
  const asked = keysUsed;
  try {
    if (!isKnown || view === 'engine') {
      const live = await get('playground/live');
      // What was answered to the key before says nothing of this one.
      if (asked !== keysUsed) return;
      meet(live);
      if (view === 'engine') engine.show(live);
    }
    if (view === 'compare' && num === 0) await compare.refresh();
    if (view === 'adapters' && num % LIVE_PER_LIST === 0) await adapters.refresh();
    if (asked === keysUsed) say(byId('trouble'), '');
  } catch (error) {
    if (asked !== keysUsed) return;
    isKnown = false;
    if (error.status === 401 || error.status === 403) askForKey(error);
    else say(byId('trouble'), error.message);
  }
}

/** Take what the server says of itself and of who asks. */
function meet(live) {
  const { caller } = live;
  byId('server').textContent = live.model;
  const who = caller.tenant && `${caller.tenant}${caller.may_manage ? ' (may manage)' : ''}`;
  byId('key-state').textContent = who || '';
  byId('key').removeAttribute('aria-invalid');
  byId('key-field').hidden = !caller.has_key;
  if (isKnown) return;
  isKnown = true;
  adapters.allow(caller);
  compare.meet(live);
}

function askForKey(error) {
  const isFirst = byId('key-field').hidden;
  needsKey = true;
  byId('key-field').hidden = false;
  byId('server').textContent = 'asks for a key';
  say(byId('trouble'), hasKey() ? error.message : 'This server asks for a key: type it above. It is kept until this page is left.');
  if (hasKey()) byId('key').setAttribute('aria-invalid', 'true');
  byId('key-state').textContent = '';
  if (isFirst) byId('key').focus();
}

function useKey() {
  setKey(byId('key').value);
  isKnown = needsKey = false;
  keysUsed += 1;
  // A second key that is wrong is said anew, too.
  say(byId('trouble'), '');
  num = 0;
  refresh();
}

async function watch() {
  num += 1;
  // Who does not look is not told; who must type a key first is not asked about.
  if (!document.hidden && !needsKey) await refresh();
  setTimeout(watch, LIVE_MS);
}

compare.start();
adapters.start();
for (const each of VIEWS) byId(`tab-${each}`).addEventListener('click', () => open(each));
document.querySelector('[role=tablist]').addEventListener('keydown', moveBetweenTabs);
byId('use-key').addEventListener('click', useKey);
compare.onEnter(byId('key'), useKey);
const wanted = location.hash.slice(1);
open(VIEWS.includes(wanted) ? wanted : 'compare');
setTimeout(watch, LIVE_MS);
