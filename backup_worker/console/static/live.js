// Keeps an open page up to date: asks for it anew when it is told that something changed. Reading needs none of this.
(function () {
  "use strict";

  var READ_MS = 8000;
  var missed = false, begun = Date.now();

  function stale(yes) {
    var note = document.getElementById("stale");
    if (note) note.hidden = !yes;
  }

  // A page that refreshes itself must not take away what somebody is typing, reading or copying.
  function inUse() {
    var active = document.activeElement;
    if (document.hidden || document.querySelector("details.ask[open]")) return true;
    if (active && active.closest("#main") && /^(INPUT|TEXTAREA|SELECT)$/.test(active.tagName)) return true;
    return String(window.getSelection()) !== "";
  }

  document.addEventListener("htmx:before:request", function (event) {
    if (inUse()) { missed = true; event.preventDefault(); }
  });
  document.addEventListener("htmx:before:response", function (event) {
    var status = event.detail.ctx.response.status;
    if (status === 401) return;
    stale(status >= 400);
    if (status >= 400) event.preventDefault();
  });
  // What came of an action stays long enough to be read, above whatever is new.
  var said = Array.from(document.querySelectorAll("[data-said]"), function (note) { return note.cloneNode(true); });
  document.addEventListener("htmx:after:swap", function () {
    var main = document.getElementById("main");
    if (Date.now() - begun < READ_MS) said.forEach(function (note) { main.prepend(note); });
  });

  document.addEventListener("htmx:error", function () { stale(true); });

  // One stream of events a window, and only while somebody looks at it: a browser allows few connections to one place.
  var EVERY_MS = 5000, LATEST_MS = 30000;
  var PAUSE_MS = 700;
  var source = null, poll = null, later = null, last = 0;

  function refresh() {
    var live = document.getElementById("live");
    if (!live || document.hidden || later) return;
    var wait = last + PAUSE_MS - Date.now();
    if (wait > 0) {
      later = window.setTimeout(function () { later = null; refresh(); }, wait);
      return;
    }
    last = Date.now();
    missed = false;
    window.htmx.trigger(live, "refresh");
  }

  function ask(yes) {
    if (yes && !poll) poll = window.setInterval(refresh, EVERY_MS);
    if (!yes && poll) { window.clearInterval(poll); poll = null; }
  }

  function hush() {
    if (source) source.close();
    source = null;
  }

  function listen() {
    var live = document.getElementById("live");
    if (!live || source || document.hidden) return;
    var topics = live.dataset.topics.split(" ");
    source = new EventSource(live.dataset.events);
    // What happened between the making of this page and now was told to nobody.
    source.addEventListener("open", function () { ask(false); refresh(); });
    source.addEventListener("changed", function (event) {
      if (event.data.split(" ").some(function (topic) { return topics.indexOf(topic) >= 0; })) refresh();
    });
    source.addEventListener("error", function () {
      ask(true);
      if (source && source.readyState === EventSource.CLOSED) source = null;
    });
  }

  document.addEventListener("visibilitychange", function () {
    if (document.hidden) { hush(); ask(false); return; }
    listen();
    refresh();
  });
  window.addEventListener("pagehide", hush);
  // Ages grow without any event; and a stream that was refused is asked for again.
  window.setInterval(function () {
    listen();
    if (missed || Date.now() - last > LATEST_MS) refresh();
  }, EVERY_MS);
  listen();
})();
