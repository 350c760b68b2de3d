// Two servers of https://github.com/panva/node-oidc-provider, for the tests:
//
//     node tests/oidc_provider.mjs FOLDER
//
// FOLDER is where `npm install oidc-provider` was run. As soon as both servers listen, the program
// prints one line of JSON: for each client, its variables for sipgate_oauth.py. The login form
// accepts any name with any password. The program ends when its stdin does.

import { once } from "node:events";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(resolve(process.argv[2], "package.json"));
const { Provider } = await import(pathToFileURL(require.resolve("oidc-provider")));

// A server that accepts secrets in the form accepts them from each client that has a secret, also
// from one that is registered for HTTP Basic. So this one needs a server of its own.
const servers = [
  {
    clientAuthMethods: ["client_secret_post", "none"],
    clients: [
      {
        client_id: "secret in the form",
        client_secret: "sAAAAAAA-form",
        token_endpoint_auth_method: "client_secret_post",
      },
      { client_id: "public", token_endpoint_auth_method: "none" },
    ],
  },
  {
    clientAuthMethods: ["client_secret_basic"],
    clients: [
      {
        client_id: "HTTP Basic",
        client_secret: "sBBBBBBB: 100% + 1&1=2 %2B",
        token_endpoint_auth_method: "client_secret_basic",
      },
    ],
  },
];
const native = {
  application_type: "native",
  redirect_uris: ["http://127.0.0.1/oauth"], // for a native client, this means any port
  grant_types: ["authorization_code", "refresh_token"],
};

const environments = {};
for (const { clientAuthMethods, clients } of servers) {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const url = `http://127.0.0.1:${server.address().port}`;
  const registered = clients.map((client) => ({ ...client, ...native }));
  server.on("request", new Provider(url, { clientAuthMethods, clients: registered }).callback());
  for (const { client_id, client_secret } of clients) {
    environments[client_id] = {
      CLIENT_ID: client_id,
      CLIENT_SECRET: client_secret ?? "", // a public client has none
      OAUTH_SCOPE: "openid offline_access",
      AUTH_URL: `${url}/auth?prompt=consent`,
      TOKEN_URL: `${url}/token`,
      TEST_API_ENDPOINT: `${url}/me`,
    };
  }
}
process.stdin.on("end", () => process.exit()).resume();
console.log(JSON.stringify(environments));
