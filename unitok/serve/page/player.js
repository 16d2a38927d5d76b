// Plays samples as they come: a queue that starts when 0.2 s are in it, and waits again when it runs dry.
class Player extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.queue = []; this.at = 0; this.held = 0; this.playing = false; this.ended = false;
    this.start = options.processorOptions.start;
    this.port.onmessage = ({ data }) => {
      if (data === "end") this.ended = true;
      else { this.queue.push(data); this.held += data.length; }
    };
  }
  process(_, [[out]]) {
    if (!this.playing) this.playing = this.held >= this.start || (this.ended && this.held > 0);
    for (let i = 0; this.playing && i < out.length; i++) {
      while (this.queue.length && this.at >= this.queue[0].length) { this.at = 0; this.queue.shift(); }
      if (!this.queue.length) { this.playing = false; break; }
      out[i] = this.queue[0][this.at++]; this.held--;
    }
    if (this.ended && !this.held) { this.port.postMessage("done"); return false; }
    return true;
  }
}
registerProcessor("player", Player);
