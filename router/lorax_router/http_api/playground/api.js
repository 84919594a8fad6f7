// Calls of the server. The key lives in this variable and nowhere else: not in a URL, a cookie or a
// storage, and it is gone with the page.

let key = '';

/** Use a key from now on; '' for none. */
export function setKey(value) {
  key = value.trim();
}

export const hasKey = () => key !== '';

/** What the server said no with: its words and its status (0: nobody answered). */
export class Refusal extends Error {
  constructor(text, status) {
    super(text);
    this.status = status;
  }
}

/** Return the words of an error, whichever route's envelope they are in. */
function wordsOf(document) {
  const error = document && document.error;
  if (typeof error === 'string') return error;
  return (error && error.message) || null;
}

async function call(path, settings = {}) {
  const headers = { ...settings.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...settings, headers, credentials: 'omit', cache: 'no-store' });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refusal('The server does not answer.', 0);
  }
  if (response.ok) return response;
  const document = await response.json().catch(() => null);
  throw new Refusal(wordsOf(document) || `The server answered ${response.status}.`, response.status);
}

/** Return the document at a path. */
export async function get(path) {
  return (await call(path)).json();
}

const posted = (body, signal) => ({
  method: 'POST',
  body: JSON.stringify(body),
  headers: { 'Content-Type': 'application/json' },
  signal,
});

/** Send a document and return the answer. */
export async function post(path, body) {
  return (await call(path, posted(body))).json();
}

function broken(error) {
  throw error.name === 'AbortError' ? error : new Refusal('The connection broke.', 0);
}

/** Send a document and yield those that are streamed back; raises what the server says went wrong. */
export async function* stream(path, body, signal) {
  const response = await call(path, posted(body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let hasEnded = false;
  for (;;) {
    const { done, value } = await reader.read().catch(broken);
    if (done) break;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data:')) continue;
      const text = line.slice(5).trim();
      if (text === '[DONE]') {
        hasEnded = true;
        continue;
      }
      const document = JSON.parse(text);
      if (document.error) throw new Refusal(wordsOf(document) || 'The answer failed.', 200);
      yield document;
    }
  }
  if (!hasEnded) throw new Refusal('The answer broke off: the connection has ended.', 0);
}
