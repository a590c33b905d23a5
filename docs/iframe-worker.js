/* Browsers give pages from disk no web worker, and the search runs in one: here it runs in a hidden
   frame. What https://github.com/squidfunk/iframe-worker does (MIT, Martin Donath), which the theme's
   plugin `offline` would load from another host. */
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    this.inside = frame.contentWindow;
    window.addEventListener("message", ({ source, data }) => {
      if (source === this.inside) this.dispatchEvent(new MessageEvent("message", { data }));
    });
    const answer = 'postMessage = (message) => parent.postMessage(message, "*")';
    this.inside.document.open();
    this.inside.document.write(`<script>${answer}</script><script src="${url}"></script>`);
    this.inside.document.close();
    this.loaded = new Promise((resolve) => (this.inside.onload = resolve));
  }

  postMessage(data) {
    this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
  }
}
if (location.protocol === "file:") window.Worker = FrameWorker;
