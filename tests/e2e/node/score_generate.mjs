// Calls Score and Generate from the protos alone and prints the answers as JSON.
//
//     node score_generate.mjs PROTO_FOLDER REWARD_ADDRESS GENERATOR_ADDRESS
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [protos, rewardAddress, generatorAddress] = process.argv.slice(2);
const definition = loadSync(["tether/v1/reward.proto", "tether/v1/generator.proto"], {
  includeDirs: [protos],
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { RewardService, GeneratorService } = grpc.loadPackageDefinition(definition).tether.v1;
const reward = new RewardService(rewardAddress, grpc.credentials.createInsecure());
const generator = new GeneratorService(generatorAddress, grpc.credentials.createInsecure());

function call(client, method, request, options = { deadline: Date.now() + 20_000 }) {
  return new Promise((resolve) => {
    client[method](request, options, (error, response) => {
      // A google.rpc.Status: here only the field names in it are of interest.
      const status = error?.metadata.get("grpc-status-details-bin")[0]?.toString("latin1");
      resolve(error ? { code: error.code, details: error.details, status } : response);
    });
  });
}

const sampling = { max_tokens: 12, temperature: 1.0, seed: 7 };
const answers = {
  score: await call(reward, "Score", {
    items: [
      { prompt: "Once upon a time", response: " all was well." },
      { prompt_token_ids: [1, 40, 41], response_token_ids: [42, 2] },
      { prompt: "nothing follows" },
    ],
  }),
  generate: await call(generator, "Generate", { prompt_token_ids: [1, 40, 41], n: 2, sampling }),
  bad_temperature: await call(generator, "Generate", { prompt: "a", n: 1, sampling: { ...sampling, temperature: -1 } }),
  no_deadline: await call(generator, "Generate", { prompt: "a", n: 1, sampling }, {}),
};
reward.close();
generator.close();
console.log(JSON.stringify(answers));
