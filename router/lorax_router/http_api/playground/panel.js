// One model's side: its conversation, what it says now, and how long that took.

import { counted, make, short } from './dom.js';
import { stream } from './api.js';
import { TokenText, tokensOf } from './tokens.js';

const ENDS = { stop: 'it had said all', length: 'most tokens reached', tool_calls: 'it calls a tool' };

export class Panel {
  constructor(model, isBase) {
    this.model = model;
    this._turns = [];
    this._abort = null;
    this._state = make('p', { className: 'state', role: 'status' }, 'ready');
    this._talk = make('div', { className: 'conversation' });
    this._facts = make('dl', { className: 'facts' });
    const title = make('h2', {}, isBase ? model.split('/').pop() : model);
    this.element = make(
      'section',
      { className: 'box panel', 'aria-label': `Answers of ${model}` },
      make('header', {}, title, make('span', { className: 'kind' }, isBase ? 'base' : 'adapter'), this._state),
      this._talk,
      this._facts,
    );
  }

  /** Forget the conversation. */
  clear() {
    this.stop();
    this._turns = [];
    this._talk.replaceChildren();
    this._facts.replaceChildren();
    this._say('ready');
  }

  /** End the answer that is being given. */
  stop() {
    if (this._abort) this._abort.abort();
  }

  /** Ask, and show the answer as it comes; never raises. */
  async ask(prompt, settings) {
    const abort = (this._abort = new AbortController());
    const before = [...this._turns];
    if (settings.mode === 'plain') this._talk.replaceChildren();
    else this._turns.push({ role: 'user', content: prompt });
    this._talk.append(make('p', { className: 'asked' }, prompt));
    const answer = new TokenText(this.model);
    this._talk.append(answer.element, answer.looked);
    this._facts.replaceChildren();
    this._say('waiting for the first token', 'busy');
    const run = { begun: performance.now(), first: null, last: null, parts: 0, usage: null, end: null };
    try {
      await this._read(prompt, settings, abort.signal, answer, run);
      this._say('done', 'done');
    } catch (error) {
      this._fail(error, answer, before);
    }
    if (settings.mode === 'chat' && answer.text) {
      this._turns.push({ role: 'assistant', content: answer.text });
    }
    this._tell(run);
    this._abort = null;
  }

  async _read(prompt, settings, signal, answer, run) {
    const [path, body] = request(this.model, prompt, this._turns, settings);
    for await (const part of stream(path, body, signal)) {
      if (part.usage) run.usage = part.usage;
      const choice = part.choices[0];
      if (!choice) continue;
      const text = choice.delta
        ? (choice.delta.reasoning_content || '') + (choice.delta.content || '')
        : choice.text;
      const tokens = tokensOf(choice.logprobs);
      if (text || tokens.length) {
        run.last = performance.now();
        run.first = run.first || run.last;
        run.parts += tokens.length || 1;
        answer.add(text || '', tokens);
        this._say(counted(run.parts, 'token'), 'busy');
      }
      if (choice.finish_reason) run.end = choice.finish_reason;
    }
  }

  _fail(error, answer, before) {
    if (!answer.text) {
      this._turns = before;
      answer.element.remove();
    }
    if (error.name === 'AbortError') {
      this._say('stopped', 'done');
      return;
    }
    this._say('failed', 'failed');
    this._talk.append(make('p', { className: 'fault', role: 'alert' }, error.message));
  }

  /** Show the figures of an answer. */
  _tell(run) {
    if (run.first === null) return;
    const seconds = (run.last - run.first) / 1000;
    const count = run.usage ? run.usage.completion_tokens : run.parts;
    const speed = count > 1 && seconds > 0 ? `${short((count - 1) / seconds)} tokens/s` : '–';
    const facts = [
      ['First token', `${short((run.first - run.begun) / 1000, 2)} s`],
      ['Speed', speed],
    ];
    if (run.usage) {
      facts.push(['Prompt', counted(run.usage.prompt_tokens, 'token')]);
      facts.push(['From the cache', counted(run.usage.prompt_tokens_details.cached_tokens, 'token')]);
    }
    facts.push(['Answer', counted(count, 'token')]);
    if (run.end) facts.push(['Ended', ENDS[run.end] || run.end]);
    this._facts.replaceChildren(
      ...facts.map(([name, value]) => make('div', {}, make('dt', {}, name), make('dd', {}, value))),
    );
  }

  _say(text, kind = '') {
    // A reader of the screen hears how it goes, and not each token.
    this._state.setAttribute('aria-live', kind === 'busy' ? 'off' : 'polite');
    this._state.textContent = text;
    this._state.className = `state ${kind}`;
  }
}

/** Return path and body of a call. */
function request(model, prompt, turns, settings) {
  const body = {
    model,
    stream: true,
    stream_options: { include_usage: true },
    ...settings.sampling,
  };
  if (settings.schema) {
    body.response_format = {
      type: 'json_schema',
      json_schema: { name: 'answer', schema: settings.schema, strict: true },
    };
  }
  if (settings.mode === 'plain') {
    if (settings.logprobs) body.logprobs = settings.logprobs;
    return ['v1/completions', { ...body, prompt }];
  }
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: settings.logprobs });
  const system = settings.system ? [{ role: 'system', content: settings.system }] : [];
  return ['v1/chat/completions', { ...body, messages: [...system, ...turns] }];
}
