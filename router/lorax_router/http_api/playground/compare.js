// The same prompt to several models at once.

import { byId, make, say } from './dom.js';
import { get } from './api.js';
import { Panel } from './panel.js';

// Alternatives of each token.
const NUM_ALTERNATIVES = 5;

// Each model that can be asked, in the order of the choices: its panel and its box.
const models = new Map();
// Where adapters come from that name no source: with it in front they are the same.
let defaultSource = '';
// Names of the operator's choosing, which stand for themselves.
let aliases = new Set();

/** Prepare the view. */
export function start() {
  byId('send').addEventListener('click', send);
  byId('stop').addEventListener('click', stop);
  byId('anew').addEventListener('click', () => models.forEach(({ panel }) => panel.clear()));
  byId('add').addEventListener('click', addOther);
  onEnter(byId('other'), addOther);
  byId('prompt').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) send();
  });
  byId('compare').addEventListener('keydown', (event) => {
    if (event.key === 'Escape') stop();
  });
  for (const each of document.getElementsByName('mode')) each.addEventListener('change', changeMode);
  // On a phone what is asked comes before how.
  if (window.matchMedia('(max-width: 60rem)').matches) byId('sampling').open = false;
}

/** Have something done when Enter is pressed in a field. */
export function onEnter(field, act) {
  field.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter') return;
    event.preventDefault();
    act();
  });
}

/** Take what the server says of itself. */
export function meet(live) {
  defaultSource = live.adapters ? live.adapters.default_source : '';
}

/** Ask which models there are; those that were there stay. */
export async function refresh() {
  const [{ data: cards }, { adapters: named }] = await Promise.all([
    get('v1/models'),
    get('v1/adapters?adapter_source=alias&limit=500'),
  ]);
  aliases = new Set(named.map((each) => each.adapter_id));
  for (const card of cards) offer(nameOf(card), card.parent === null, models.size === 0);
}

/** Return what to call a model: an adapter with its source, so that it is here once. */
function nameOf(card) {
  const isShort = card.parent !== null && card.id === card.root && !card.id.includes('://');
  return isShort && !aliases.has(card.id) ? `${defaultSource}:${card.id}` : card.id;
}

/** Offer a model, chosen or not. */
export function offer(id, isBase, isChosen) {
  if (models.has(id)) {
    if (isChosen) choose(id, true);
    return;
  }
  const box = make('input', { type: 'checkbox' });
  const model = { box, panel: new Panel(id, isBase) };
  models.set(id, model);
  box.addEventListener('change', () => show(model));
  byId('choices').append(make('label', { className: 'choice' }, box, ` ${id}`));
  choose(id, isChosen);
}

function choose(id, isChosen) {
  models.get(id).box.checked = isChosen;
  show(models.get(id));
}

function show(model) {
  if (!model.box.checked) {
    model.panel.stop();
    model.panel.element.remove();
    return;
  }
  const chosen = [...models.values()].filter((each) => each.box.checked);
  byId('panels').replaceChildren(...chosen.map((each) => each.panel.element));
}

function addOther() {
  const id = byId('other').value.trim();
  if (!id) return;
  const whole = `${defaultSource}:${id}`;
  offer(models.has(whole) && !aliases.has(id) ? whole : id, false, true);
  byId('other').value = '';
}

function changeMode() {
  const isChat = byId('mode-chat').checked;
  byId('system-label').hidden = !isChat;
  byId('prompt-name').textContent = isChat ? 'Message' : 'Prompt';
  byId('anew').hidden = !isChat;
}

async function send() {
  const settings = settingsOf();
  const prompt = byId('prompt').value;
  const chosen = [...models.values()].filter((each) => each.box.checked);
  if (!settings || !prompt || !chosen.length || byId('send').disabled) return;
  byId('send').disabled = true;
  byId('stop').disabled = false;
  if (settings.mode === 'chat') byId('prompt').value = '';
  await Promise.all(chosen.map(({ panel }) => panel.ask(prompt, settings)));
  byId('send').disabled = false;
  byId('stop').disabled = true;
}

function stop() {
  models.forEach(({ panel }) => panel.stop());
}

/** Return how answers are drawn, or null where the schema is no JSON. */
function settingsOf() {
  const schema = schemaOf();
  if (schema === undefined) return null;
  const sampling = {};
  for (const [id, name] of [
    ['temperature', 'temperature'],
    ['top-p', 'top_p'],
    ['max-tokens', 'max_tokens'],
    ['seed', 'seed'],
  ]) {
    // What is left empty is the server's to choose.
    if (byId(id).value !== '') sampling[name] = Number(byId(id).value);
  }
  return {
    mode: byId('mode-plain').checked ? 'plain' : 'chat',
    system: byId('system').value.trim(),
    logprobs: byId('logprobs').checked ? NUM_ALTERNATIVES : 0,
    sampling,
    schema,
  };
}

/** Return the schema, null for none, undefined if its text is at fault. */
function schemaOf() {
  const field = byId('schema');
  say(byId('schema-fault'), '');
  field.removeAttribute('aria-invalid');
  if (!byId('use-schema').checked) return null;
  try {
    return JSON.parse(field.value);
  } catch (error) {
    byId('binding').open = true;
    field.setAttribute('aria-invalid', 'true');
    say(byId('schema-fault'), `This is no JSON: ${error.message}`);
    field.focus();
    return undefined;
  }
}
