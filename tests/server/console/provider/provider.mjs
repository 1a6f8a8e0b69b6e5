// An identity provider as a process of its own: the certified `oidc-provider`, with the people that the test names.
// node provider.mjs '{"port": …, "client": …, "secret": …, "back": …, "people": {"login": {"groups": […], …}}}'
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(process.argv[2]);
const from = createRequire(pathToFileURL(asked.modules + "/"));
const { Provider } = await import(pathToFileURL(from.resolve("oidc-provider")));

const provider = new Provider(`http://127.0.0.1:${asked.port}`, {
  clients: [{
    client_id: asked.client, client_secret: asked.secret, redirect_uris: [asked.back],
    grant_types: ["authorization_code"], response_types: ["code"],
  }],
  claims: { openid: ["sub", "groups"], profile: ["preferred_username"] },
  conformIdTokenClaims: false,
  pkce: { required: () => true },
  cookies: { keys: ["only for a test"] },
  features: { devInteractions: { enabled: true } },
  findAccount: (context, login) => {
    const person = asked.people[login];
    return person && { accountId: login, claims: () => ({ sub: login, preferred_username: login, ...person }) };
  },
});
createServer(provider.callback()).listen(asked.port, "127.0.0.1", () => console.log("ready"));
