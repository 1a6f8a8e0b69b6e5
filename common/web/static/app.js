// The little that a page needs beside htmx: the token on its requests, live parts, and bringing errors into view.
(() => {
  "use strict";
  const token = document.querySelector('meta[name="csrf"]');
  document.addEventListener("htmx:configRequest", (event) => {
    if (token) event.detail.headers["X-CSRF-Token"] = token.content;
  });

  // <div data-live="/path/of/events">: each event names a part of the page, and its data is that part's new content.
  for (const part of document.querySelectorAll("[data-live]")) {
    let source = null;
    const open = () => {
      source = new EventSource(part.dataset.live);
      source.addEventListener("part", (event) => {
        const told = JSON.parse(event.data);
        const place = document.getElementById(told.id);
        if (place && place.innerHTML !== told.html) {
          place.innerHTML = told.html;
          if (window.htmx) window.htmx.process(place);
        }
      });
      source.addEventListener("end", () => source.close());
    };
    open();
    // A page nobody looks at asks for nothing.
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) source.close();
      else open();
    });
  }

  // On a phone the navigation is wider than the screen: show where the page is.
  const here = document.querySelector(".bar nav [aria-current]");
  const bar = here && here.closest("nav");
  if (bar && bar.scrollWidth > bar.clientWidth) bar.scrollLeft = here.offsetLeft - bar.clientWidth / 2 + here.offsetWidth / 2;

  const alert = document.querySelector('[role="alert"]');
  if (alert) alert.scrollIntoView({ block: "nearest" });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button || !navigator.clipboard) return;
    navigator.clipboard.writeText(button.dataset.copy).then(() => { button.textContent = "Copied"; });
  });
})();
