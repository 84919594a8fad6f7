// Elements without markup: texts of the server are never read as HTML.

/** Return the element of an id. */
export const byId = (id) => document.getElementById(id);

/** Make an element with properties, and attributes where a name has a dash or is `role`. */
export function make(name, settings = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(settings)) {
    if (key.includes('-') || key === 'role') element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.filter((each) => each !== null && each !== undefined));
  return element;
}

/** Make an element of a drawing. */
export function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Show a text, or hide its element where there is none. */
export function say(element, text) {
  // What is there already is not announced again.
  if (element.textContent !== text) element.textContent = text;
  element.hidden = !text;
}

/** Return a number with few digits. */
export function short(value, digits = 1) {
  return Number.isFinite(value) ? value.toFixed(value >= 100 ? 0 : digits) : '–';
}

/** Return bytes in words. */
export function bytes(count) {
  const units = ['B', 'KB', 'MB', 'GB', 'TB'];
  let place = 0;
  while (count >= 1000 && place < units.length - 1) {
    count /= 1000;
    place += 1;
  }
  return `${short(count, place ? 1 : 0)} ${units[place]}`;
}

/** Return a number with its noun. */
export const counted = (count, noun) => `${count} ${noun}${count === 1 ? '' : 's'}`;
