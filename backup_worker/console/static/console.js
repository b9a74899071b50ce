// Small conveniences; every page reads without them.
(function () {
  "use strict";

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
    if (inUse()) event.preventDefault();
  });
  document.addEventListener("htmx:before:response", function (event) {
    var status = event.detail.ctx.response.status;
    if (status === 401) return;
    stale(status >= 400);
    if (status >= 400) event.preventDefault();
  });
  document.addEventListener("htmx:error", function () { stale(true); });

  // One stream of events a window, and only while somebody looks at it: a browser allows few connections to one place.
  var EVERY_MS = 5000, LATEST_MS = 30000;
  var source = null, poll = null, last = Date.now();

  function refresh() {
    var live = document.getElementById("live");
    if (!live || document.hidden || Date.now() - last < 700) return;
    last = Date.now();
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
    source.addEventListener("open", function () { ask(false); });
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
    if (Date.now() - last > LATEST_MS) refresh();
  }, EVERY_MS);
  listen();

  document.addEventListener("change", function (event) {
    var form = event.target.closest("form[data-auto]");
    if (form) form.requestSubmit();
  });

  document.addEventListener("click", function (event) {
    var button = event.target.closest("button[data-copy]");
    if (!button || !navigator.clipboard) return;
    navigator.clipboard.writeText(button.dataset.copy).then(function () {
      button.textContent = "copied";
      window.setTimeout(function () { button.textContent = "copy"; }, 1500);
    });
  });

  document.documentElement.classList.add("js");
})();
