// The server's API as this page uses it: which models there are, and one streamed chat.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Api {
  // `key`: a function that returns the API key to send, or "".
  constructor(key) {
    this.key = key;
  }

  async models() {
    return (await this.#json("v1/models")).data.map((model) => model.id);
  }

  // Facts of one model; null where it cannot say.
  async model(name) {
    return await this.#json("v1/models/" + name.split("/").map(encodeURIComponent).join("/"));
  }

  // Calls onDelta({content, reasoning}) as text comes; returns {usage, finishReason}. Stops when `signal` aborts.
  async chat(body, onDelta, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    let usage = null;
    let finishReason = null;
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return { usage, finishReason };
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(response.status, event.error.message);
      if (event.usage) usage = event.usage;
      for (const choice of event.choices ?? []) {
        if (choice.finish_reason) finishReason = choice.finish_reason;
        const { content = "", reasoning_content: reasoning = "" } = choice.delta;
        if (content || reasoning) onDelta({ content: content ?? "", reasoning: reasoning ?? "" });
      }
    }
    throw new ApiError(response.status, "the answer broke off");
  }

  async #json(path) {
    return await (await this.#fetch(path, {})).json();
  }

  async #fetch(path, options) {
    const key = this.key();
    const headers = { ...options.headers, ...(key && { authorization: "Bearer " + key }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "the server cannot be reached");
    }
    if (response.ok) return response;
    let message = response.statusText || "error " + response.status;
    try {
      message = (await response.json()).error.message;
    } catch {
      // Not the server's own error: a proxy's page, say.
    }
    throw new ApiError(response.status, message);
  }
}

// The data of server-sent events, one string an event.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      let end;
      while ((end = held.indexOf("\n\n")) >= 0) {
        const lines = held.slice(0, end).split("\n");
        held = held.slice(end + 2);
        const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
