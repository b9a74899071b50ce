// Takes the place of Underscore in the RQ dashboard's pages. Its templates are filled in without evaluating anything,
// and every value is escaped: a job's description is text that somebody else wrote.
(function () {
  "use strict";

  var NAMES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

  function esc(value) {
    if (value === null || value === undefined) return "";
    return String(value).replace(/[&<>"']/g, function (char) { return NAMES[char]; });
  }

  function link(url, text) {
    return '<a href="' + esc(url) + '">' + esc(text) + "</a>";
  }

  function jobLink(id, text) {
    return link(window.url_for_single_job_view(id), text === undefined ? id : text);
  }

  function queueRow(d) {
    var cells = [
      [d.queued_url, d.count], [d.deferred_url, d.deferred_job_registry_count],
      [d.scheduled_url, d.scheduled_job_registry_count], [d.started_url, d.started_job_registry_count],
      [d.finished_url, d.finished_job_registry_count], [d.failed_url, d.failed_job_registry_count],
      [d.canceled_url, d.canceled_job_registry_count]
    ];
    return '<tr data-role="queue"><th scope="row">' + esc(d.name) + "</th>" + cells.map(function (cell, at) {
      var tone = cell[1] === 0 ? "zero" : at === 5 ? "bad" : "some";
      return '<td class="narrow ' + tone + '">' + link(cell[0], cell[1]) + "</td>";
    }).join("") + "</tr>";
  }

  function workerRow(d) {
    var job = d.current_job;
    var busy = job !== "idle";
    var cell = busy
      ? '<td title="' + esc(job.description) + '">' + jobLink(job.job_id, job.call_string || job.job_id) + "</td>"
      : "<td>idle</td>";
    var version = d.version ? "RQ " + d.version + ", Python " + d.python_version : "";
    return '<tr data-role="worker"><th scope="row" title="' + esc(version) + '">' + esc(d.name) + "</th>" + cell +
      "<td>" + esc(d.queues.join(", ")) + "</td></tr>";
  }

  function jobRow(d, text) {
    var html = '<tr data-role="job" data-job-id="' + esc(d.id) + '"><td><span class="description">' +
      esc(d.description) + '</span><div class="job_id">' + jobLink(d.id) + "</div>";
    if (d.exc_info) {
      html += '<span class="end_date">Failed ' + esc(d.ended_at) + '</span><pre class="exc_info">' +
        esc(d.exc_info) + "</pre>";
    }
    html += '</td><td><span class="creation_date">' + esc(d.created_at) + '</span></td><td class="actions narrow">';
    if (d.exc_info) html += '<a href="#" role="button" data-role="requeue-job-btn" class="btn">Requeue</a> ';
    if (text.indexOf("delete-job-btn") >= 0) {
      html += '<a href="#" role="button" data-role="delete-job-btn" class="btn danger">Delete</a>';
    }
    return html + "</td></tr>";
  }

  function jobInfo(d) {
    var facts = [
      ["Description", "<code>" + esc(d.description) + "</code>"], ["Queue", esc(d.origin)],
      ["Status", '<span class="tag">' + esc(d.status) + "</span>"],
      ["Created", esc(d.created_at)], ["Enqueued", esc(d.enqueued_at)], ["Started", esc(d.started_at)],
      ["Ended", esc(d.ended_at)], ["Result", "<pre>" + esc(JSON.stringify(d.result, null, 2)) + "</pre>"],
      ["Metadata", "<pre>" + esc(d.metadata) + "</pre>"]
    ];
    if (d.depends_on) {
      facts.push(["Depends on", d.depends_on.map(function (id, at) {
        return d.depends_on_status[at] === "active" ? jobLink(id) : esc(id) + " (gone)";
      }).join("<br>")]);
    }
    if (d.exc_info) facts.push(["Exception", '<pre class="exc_info">' + esc(d.exc_info) + "</pre>"]);
    return '<dl class="facts">' + facts.map(function (fact) {
      return "<div><dt>" + fact[0] + "</dt><dd>" + fact[1] + "</dd></div>";
    }).join("") + "</dl>";
  }

  var KNOWN = [
    ['data-role="queue"', queueRow], ['data-role="worker"', workerRow], ['data-role="job"', jobRow],
    ["description-scroll", jobInfo]
  ];

  window._ = {
    template: function (text) {
      for (var i = 0; i < KNOWN.length; i++) {
        if (text.indexOf(KNOWN[i][0]) >= 0) {
          var fill = KNOWN[i][1];
          return function (data) { return fill(data.d, text); };
        }
      }
      // The links between pages: a value or two, and no logic.
      return function (data) {
        return text.replace(/<%=\s*(\w+)\s*%>/g, function (_, name) { return esc(data[name]); });
      };
    }
  };

  var token = document.querySelector('meta[name="csrf-token"]');
  window.jQuery.ajaxSetup({ headers: { "X-CSRFToken": token ? token.content : "" } });
})();
