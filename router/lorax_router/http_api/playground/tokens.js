// The text of an answer, token by token, each with what else could have come.

import { make } from './dom.js';

const LEVELS = [0.9, 0.6, 0.3, 0.1];

/** Return which of five shades a probability has: 0 is nearly certain. */
function levelOf(probability) {
  const level = LEVELS.findIndex((least) => probability >= least);
  return level < 0 ? LEVELS.length : level;
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share < 0.1 ? '< 0.1 %' : `${share.toFixed(1)} %`;
};

const visible = (text) => text.replaceAll('\n', '↵').replaceAll('\t', '⇥').replaceAll(' ', '␣') || '(nothing)';

/** Return tokens of a part of a chat's or a completion's stream: text, logprob, alternatives. */
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((each) => ({
      text: each.token,
      logprob: each.logprob,
      others: each.top_logprobs.map((top) => [top.token, top.logprob]),
    }));
  }
  return logprobs.tokens.map((text, place) => ({
    text,
    logprob: logprobs.token_logprobs[place],
    others: Object.entries((logprobs.top_logprobs || [])[place] || {}),
  }));
}

/** An answer that grows, whose tokens can be looked at with a pointer or the arrow keys. */
export class TokenText {
  constructor(name) {
    this.text = '';
    this._tokens = [];
    this._at = -1;
    this.looked = make('div', { className: 'looked', 'aria-live': 'polite', hidden: true });
    this.element = make('div', { className: 'answer', role: 'group', tabIndex: 0 });
    this.element.setAttribute('aria-label', `Answer of ${name}; arrow keys look at its tokens`);
    this.element.addEventListener('pointerover', (event) => this._point(event));
    this.element.addEventListener('click', (event) => this._point(event));
    this.element.addEventListener('keydown', (event) => this._step(event));
    this.element.addEventListener('focus', () => this._show(Math.max(this._at, 0)));
  }

  /** Add a text and the tokens that it is made of. */
  add(text, tokens) {
    this.text += text;
    const whole = tokens.map((each) => each.text).join('');
    if (tokens.length === 0) {
      if (text) this.element.append(text);
      return;
    }
    // What is held back or left out (half a character, a special token) is shown with its neighbours.
    const pieces = whole === text ? tokens.map((each) => each.text) : [text, ...tokens.slice(1).map(() => '')];
    tokens.forEach((token, place) => {
      const span = make('span', { className: `token level-${levelOf(Math.exp(token.logprob))}` }, pieces[place]);
      span.place = this._tokens.length;
      this._tokens.push({ ...token, span });
      this.element.append(span);
    });
  }

  _point(event) {
    if (event.target.place !== undefined) this._show(event.target.place);
  }

  _step(event) {
    const last = this._tokens.length - 1;
    const places = { ArrowRight: this._at + 1, ArrowLeft: this._at - 1, Home: 0, End: last };
    if (!(event.key in places) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this._show(Math.min(Math.max(places[event.key], 0), last));
  }

  _show(place) {
    const token = this._tokens[place];
    if (!token) return;
    if (this._at >= 0) this._tokens[this._at].span.classList.remove('is-at');
    this._at = place;
    token.span.classList.add('is-at');
    const others = token.others.filter(([text]) => text !== token.text);
    this.looked.hidden = false;
    this.looked.replaceChildren(
      row(token.text, token.logprob, 'taken'),
      ...others.map(([text, logprob]) => row(text, logprob, 'other')),
    );
  }
}

function row(text, logprob, kind) {
  const bar = make('span', { className: 'bar', 'aria-hidden': 'true' });
  // By the object model: the policy of this page lets no style into its markup.
  bar.style.setProperty('--share', Math.exp(logprob));
  return make(
    'p',
    { className: kind },
    make('code', {}, visible(text)),
    bar,
    make('span', { className: 'share' }, percent(logprob)),
  );
}
