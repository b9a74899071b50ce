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
