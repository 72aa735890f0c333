(() => {
  const script = new URL(document.currentScript.src);
  const shown = script.searchParams.get("version");
  const method = script.searchParams.get("method");
  const notice = document.createElement("p");
  notice.setAttribute("role", "alert");
  Object.assign(notice.style, {
    position: "fixed", inset: "0 0 auto", margin: 0, padding: "0.5em 1em",
    background: "#8a1c1c", color: "#fff", font: "1rem sans-serif", zIndex: 2147483647,
  });
  let events, timer, failures = 0;

  function say(text) {
    notice.textContent = text;
    document.body.append(notice);
  }

  function connect() {
    events?.close();
    clearTimeout(timer);
    if (document.hidden) return; // a browser has only six connections to a server
    events = new EventSource(new URL("events", script));
    events.onmessage = ({ data }) => {
      failures = 0;
      notice.remove();
      if (data === shown) return;
      if (method === "GET") return location.reload();
      say("There is a new version. Reloading this page sends the form again.");
    };
    events.onerror = () => {
      events.close();
      failures += 1;
      if (failures > 1) say("The server does not respond. This page waits for it.");
      timer = setTimeout(connect, failures > 1 ? 500 : 0);
    };
  }

  addEventListener("pageshow", connect);
  addEventListener("visibilitychange", connect);
})();
