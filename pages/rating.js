"use strict";
// Plays one clip (or pair) after the other, takes an answer once all of it was heard, and makes the file to send back.
const {study, rater, kind, items} = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const key = `rating ${study} ${rater}`, radios = [...document.querySelectorAll("#scale input")];
let sounds = [], place = "intro", state = {began: null, now: 0, answers: items.map(item => ({
  answer: null, plays: item.sounds.map(() => 0), heard: item.sounds.map(() => false), seconds: 0, changes: 0, time: null}))};

const keep = () => {
  try {
    localStorage.setItem(key, JSON.stringify(state));
  } catch {
    at("storage").textContent = "This browser keeps nothing for this page: do not close it before the file is saved.";
  }
};
try {
  const kept = JSON.parse(localStorage.getItem(key) ?? "null");
  if (kept?.answers?.length === items.length && kept.now < items.length) state = kept;
} catch { /* what is no JSON is no answer; that nothing is kept shows when keep() is called */ }

const show = name => {
  sounds.forEach(sound => sound.pause());
  for (const id of ["intro", "trial", "finish"]) at(id).hidden = id !== (place = name);
};
const ready = () => state.answers[state.now].heard.every(Boolean);
const refresh = () => {
  const mine = state.answers[state.now], broken = sounds.some(sound => sound.error);
  for (const radio of radios) {
    radio.disabled = !ready();
    radio.checked = radio.value === String(mine.answer);
  }
  at("scale").classList.toggle("closed", !ready());
  at("back").disabled = state.now === 0;
  at("next").disabled = mine.answer === null && !broken;
  at("status").textContent = broken ? "A sound of this page is missing or cannot be played; tell who sent it to you." :
    !ready() ? `Listen to ${kind === "opinion" ? "the end" : "the end of both"}, then answer.` :
    mine.answer === null ? "Now answer." : "Answered; Next, or Enter, goes on.";
  sounds.forEach((sound, i) => {
    const name = sounds.length > 1 ? " " + "AB"[i] : "";
    sound.button.textContent = (sound.paused ? "▶ Play" : "❚❚ Pause") + name;
    sound.bar.value = sound.duration ? sound.currentTime / sound.duration : 0;
  });
};
const toggle = sound => {
  if (!sound.paused) return sound.pause();
  sounds.forEach(other => other.pause());
  sound.from = sound.currentTime;
  if (!sound.from) state.answers[state.now].plays[sounds.indexOf(sound)] += 1;
  sound.play().catch(refresh);
};
const player = (source, i) => {  // without the browser's own controls: they would let one skip to the end
  const mine = state.answers[state.now], row = document.createElement("div");
  const sound = Object.assign(new Audio(source), {preload: "auto"});
  sound.button = Object.assign(document.createElement("button"), {className: "play", id: `play-${"AB"[i]}`});
  sound.bar = Object.assign(document.createElement("progress"), {max: 1, value: 0});
  sound.bar.setAttribute("aria-label", "how much of it was played");
  sound.button.addEventListener("click", () => toggle(sound));
  sound.addEventListener("pause", () => {
    mine.seconds = Math.round(100 * (mine.seconds + sound.currentTime - sound.from)) / 100;
    keep();
    refresh();
  });
  sound.addEventListener("ended", () => {
    mine.heard[i] = true;
    sound.currentTime = 0;
    keep();
    refresh();
  });
  for (const event of ["play", "timeupdate", "error"]) sound.addEventListener(event, refresh);
  row.className = "player";
  row.append(sound.button, sound.bar, sound);
  at("players").append(row);
  return sound;
};
const go = number => {
  show("trial");
  state.now = number;
  const item = items[number], practice = items.filter(each => each.practice).length;
  at("progress").textContent = item.practice ? `Practice ${number + 1} of ${practice}` :
    `${number + 1 - practice} of ${items.length - practice}`;
  at("ask").hidden = item.ask === null;
  at("ask").textContent = `Whatever you hear, please answer ${item.ask} here.`;
  at("players").replaceChildren();
  sounds = item.sounds.map(player);
  keep();
  refresh();
  at("progress").focus();
};
const choose = radio => {
  const mine = state.answers[state.now];
  if (!ready()) return refresh();
  if (mine.answer !== null && String(mine.answer) !== radio.value) mine.changes += 1;
  mine.answer = kind === "opinion" ? Number(radio.value) : radio.value;
  mine.time = new Date().toISOString();
  keep();
  refresh();
};

const crc32 = text => {  // of ASCII, as in zip files
  let rest = -1;
  for (const letter of text) {
    rest ^= letter.charCodeAt(0);
    for (let bit = 0; bit < 8; bit++) rest = (rest >>> 1) ^ (rest & 1 ? 0xedb88320 : 0);
  }
  return (~rest >>> 0).toString(16).padStart(8, "0");
};
const result = () => {
  const answers = state.answers.flatMap(({answer, plays, seconds, changes, time}, position) => answer === null ? [] :
    [{position, clips: items[position].clips, answer, plays, seconds, changes, time}]);
  const told = answers.map(each => ` ${each.position}:${each.clips.join("+")}=${each.answer}`).join(""), {began} = state;
  const check = crc32(study + " " + rater + told);
  return JSON.stringify({study, rater, began, complete: answers.length === items.length, answers, check}, null, 1);
};
const finish = () => {
  show("finish");
  const given = state.answers.filter(each => each.answer !== null).length;
  at("done").textContent = given === items.length ? "Done. Thank you!" : `${given} of ${items.length} are answered.`;
  at("copy").value = result();
  at("done").focus();
};

at("start").addEventListener("click", () => {
  state.began ??= new Date().toISOString();
  go(state.now);
});
at("back").addEventListener("click", () => go(state.now - 1));
at("next").addEventListener("click", () => state.now + 1 < items.length ? go(state.now + 1) : finish());
at("stop").addEventListener("click", finish);
at("review").addEventListener("click", () => go(state.now));
at("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([result()], {type: "application/json"}));
  link.download = `${rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});
radios.forEach(radio => radio.addEventListener("change", () => choose(radio)));
document.addEventListener("keydown", event => {
  if (place !== "trial" || event.ctrlKey || event.altKey || event.metaKey) return;
  const onButton = event.target.tagName === "BUTTON", digit = radios.find(radio => radio.dataset.key === event.key);
  const side = sounds.length > 1 ? "ab".indexOf(event.key.toLowerCase()) : -1, next = state.answers[state.now].heard.indexOf(false);
  if (digit) choose(digit);
  else if (event.key === " " && !onButton) toggle(sounds.find(sound => !sound.paused) ?? sounds[Math.max(0, next)]);
  else if (event.key === "Enter" && !onButton) at("next").click();
  else if (side >= 0) toggle(sounds[side]);
  else return;
  event.preventDefault();
});
if (state.began) at("start").textContent = "Go on where you stopped";
show("intro");
keep();
