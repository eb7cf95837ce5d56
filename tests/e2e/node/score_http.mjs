// Calls Score over HTTP with nothing but fetch, and prints the answers as JSON.
//
//     node score_http.mjs REWARD_HTTP_ADDRESS
const [address] = process.argv.slice(2);

async function call(message, headers = {}) {
  const response = await fetch(`http://${address}/tether.v1.RewardService/Score`, {
    method: "POST",
    headers: { "content-type": "application/json", "connect-timeout-ms": "20000", ...headers },
    body: JSON.stringify(message),
  });
  return { status: response.status, body: await response.json() };
}

const answers = {
  score: await call({
    items: [
      { prompt: "Once upon a time", response: " all was well." },
      { promptTokenIds: [1, 40, 41], responseTokenIds: [42, 2] },
      { prompt: "nothing follows" },
    ],
  }),
  none: await call({ items: [] }),
};
console.log(JSON.stringify(answers));
