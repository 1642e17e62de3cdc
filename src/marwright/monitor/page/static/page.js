"use strict";
// What the page does beyond its HTML: signing in by address, live updates, the filter, dropped files.
// Texts are set as text; HTML is only taken from this server, which has escaped it.

const AGAIN = 30000;  // until somebody who was refused asks again

function signIn() {
  const form = document.getElementById("login");
  const ticket = location.hash.slice(1);
  if (!form || !ticket) return;
  history.replaceState(null, "", location.pathname + location.search);
  form.elements.token.value = ticket;
  form.submit();
}

function say(text) {
  const place = document.getElementById("connection");
  if (place && place.textContent !== text) place.textContent = text;
}

function announce(notes) {
  const place = document.getElementById("notes");
  if (place && notes.length) place.textContent = notes.join(" ");
}

function setText(node, text) {
  if (node && node.textContent !== text) node.textContent = text;
}

function apply(look) {
  for (const node of document.querySelectorAll("[data-live]")) {
    if (node.dataset.live in look.text) setText(node, look.text[node.dataset.live]);
  }
  for (const node of document.querySelectorAll("[data-html]")) {
    if (node.dataset.html in look.html) node.innerHTML = look.html[node.dataset.html];
  }
  if (Object.keys(look.rows).length) {
    for (const row of document.querySelectorAll("tr[data-key]")) {
      const values = look.rows[row.dataset.key];
      if (!values) continue;
      row.dataset.mood = values[0];
      values.slice(1).forEach((text, n) => setText(row.cells[n + 1], text));
    }
  }
  announce(look.notes);
  const main = document.getElementById("main");
  if (main.dataset.stamp !== look.stamp) renew(look.stamp);
}

function name(node) {
  return (node.querySelector("h3") || node.querySelector("summary")).textContent;
}

let renewing = false;

async function renew(stamp) {
  // Something has come or gone: fetch the page, and keep what somebody is at.
  if (renewing) return;
  renewing = true;
  try {
    const answer = await fetch(location.pathname + location.search, {cache: "no-store"});
    if (answer.status === 401) return location.reload();
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.getElementById("main"), main = document.getElementById("main");
    if (!fresh) return;
    const focused = document.activeElement ? document.activeElement.id : "";
    const filter = document.getElementById("filter");
    const kept = filter ? filter.value : "";
    const open = new Map([...main.querySelectorAll("details")].map((node) => [name(node), node.open]));
    main.replaceChildren(...fresh.childNodes);
    Object.assign(main.dataset, fresh.dataset);
    main.dataset.stamp = answer.ok ? fresh.dataset.stamp : stamp;
    for (const node of main.querySelectorAll("details")) {
      if (open.has(name(node))) node.open = open.get(name(node));
    }
    prepare();
    const box = document.getElementById("filter");
    if (box && box.value !== kept) { box.value = kept; choose(box); }
    if (focused && document.getElementById(focused)) document.getElementById(focused).focus();
  } finally {
    renewing = false;
  }
}

function follow() {
  const main = document.getElementById("main");
  if (!main || !main.dataset.topic) return;
  const {topic, model, version} = main.dataset;
  const watched = ["overview", "version", "releases", "failures"].includes(topic);
  if (!watched) return say("");
  const query = new URLSearchParams({topic, model, version});
  const source = new EventSource("/api/events?" + query);
  source.onopen = () => say("It follows by itself.");
  source.addEventListener("look", (event) => apply(JSON.parse(event.data)));
  source.onerror = () => {
    const isOver = source.readyState === EventSource.CLOSED;
    const text = isOver ? "It does not follow now: too many viewers, or signed out. Reload it."
      : "The page's own server does not answer; it is tried again.";
    announce([text]);
    say(text);
    if (isOver) setTimeout(follow, AGAIN);
  };
  addEventListener("pagehide", () => source.close(), {once: true});
}

function choose(box) {
  const wanted = box.value.trim().toLowerCase();
  let found = 0;
  for (const group of document.querySelectorAll("details.group")) {
    let here = 0;
    for (const row of group.querySelectorAll("tr[data-key]")) {
      row.hidden = !row.dataset.key.toLowerCase().includes(wanted);
      here += !row.hidden;
    }
    group.hidden = !here;
    if (wanted && here) group.open = true;
    found += here;
  }
  setText(document.getElementById("found"), found + (found === 1 ? " version" : " versions"));
}

function acceptDrops() {
  const place = document.getElementById("drop"), input = document.getElementById("file");
  if (!place || !input) return;
  const mark = (on) => (event) => { event.preventDefault(); place.classList.toggle("over", on); };
  place.addEventListener("dragover", mark(true));
  place.addEventListener("dragleave", mark(false));
  place.addEventListener("drop", (event) => {
    mark(false)(event);
    if (!event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    tell();
  });
  const tell = () => {
    const file = input.files[0];
    setText(document.getElementById("hint"), file ? file.name + " is chosen." : "Choose a file, or drop one here.");
  };
  input.addEventListener("change", tell);
  input.form.addEventListener("submit", () => announce(["The model is asked."]));
}

function prepare() {
  const box = document.getElementById("filter");
  if (box) {
    box.addEventListener("input", () => choose(box));
    box.form.addEventListener("submit", (event) => { event.preventDefault(); choose(box); });
  }
  acceptDrops();
}

signIn();
prepare();
follow();
const result = document.getElementById("result");
if (result) result.focus();
