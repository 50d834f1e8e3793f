"use strict";
// Plays single units of a clip and runs a cursor along it. A box's place is its time, PIXELS (100) a second.
const PIXELS = 100;
let playing = null;

for (const clip of document.querySelectorAll("figure.clip")) {
  const audio = clip.querySelector("audio"), svg = clip.querySelector("svg"), cursor = clip.querySelector(".cursor");
  const boxes = [...clip.querySelectorAll("rect")], said = clip.querySelector("output");
  const times = boxes.map(box => [box.x.baseVal.value / PIXELS, (box.x.baseVal.value + box.width.baseVal.value) / PIXELS]);
  let current = -1, end = null;  // the unit that was chosen; where to stop

  const mark = index => {
    if (index === current) return;
    boxes[current]?.classList.remove("now");
    current = index;
    if (!boxes[index]) return;
    boxes[index].classList.add("now");
    if (audio.paused || end !== null) said.textContent = boxes[index].querySelector("title").textContent;
  };
  const play = (from, to) => {
    end = to;
    audio.currentTime = from;
    audio.play();
  };
  const choose = index => {
    if (!boxes[index]) return;
    mark(index);
    said.textContent = boxes[index].querySelector("title").textContent;
    const box = boxes[index].getBoundingClientRect(), frame = svg.parentElement.getBoundingClientRect();
    if (box.left < frame.left || box.right > frame.right) svg.parentElement.scrollLeft += box.left - frame.left - frame.width / 2;
    play(...times[index]);
  };
  const follow = () => {  // once a picture of the screen: timeupdate comes four times a second, units fifteen times
    const now = audio.currentTime;
    if (end !== null && now >= end) audio.pause();
    cursor.setAttribute("x1", now * PIXELS);
    cursor.setAttribute("x2", now * PIXELS);
    if (end === null) mark(times.findIndex(([from, to]) => from <= now && now < to));
    if (!audio.paused) requestAnimationFrame(follow);
  };

  audio.addEventListener("play", () => {
    if (playing && playing !== audio) playing.pause();
    playing = audio;
    requestAnimationFrame(follow);
  });
  audio.addEventListener("pause", () => { end = null; });
  boxes.forEach((box, index) => box.addEventListener("click", () => { svg.focus(); choose(index); }));
  svg.addEventListener("keydown", event => {
    const steps = {ArrowRight: current + 1, ArrowLeft: Math.max(0, current - 1), Home: 0, End: boxes.length - 1, Enter: Math.max(0, current)};
    if (event.key === " ") {
      if (audio.paused || end !== null) play(times[current]?.[0] ?? 0, null); else audio.pause();
    } else if (event.key in steps) choose(steps[event.key]);
    else return;
    event.preventDefault();
  });
}

// A place in a recording, #t=begin,end: browsers stop at its end once; here it is heard from its beginning every time.
document.addEventListener("play", event => {
  const audio = event.target, [begin, end] = audio.src.split("#t=")[1]?.split(",").map(Number) ?? [];
  if (end === undefined) return;
  if (playing && playing !== audio) playing.pause();
  playing = audio;
  if (audio.currentTime < begin || audio.currentTime >= end - 0.01) audio.currentTime = begin;
  const follow = () => {
    if (audio.currentTime >= end) audio.pause(); else if (!audio.paused) requestAnimationFrame(follow);
  };
  follow();
}, true);
