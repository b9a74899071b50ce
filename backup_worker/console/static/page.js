// Small conveniences on every page; every page reads without them.
(function () {
  "use strict";

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

  // Where the pages do not fit beside each other, the one that is open is in sight.
  var open = document.querySelector(".top nav [aria-current]");
  if (open) open.parentElement.scrollLeft = open.offsetLeft - 48;

  document.documentElement.classList.add("js");
})();
