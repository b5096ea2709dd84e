// A provider of identities, certified for OpenID Connect (npm: oidc-provider), for tests alone: it believes
// whatever login is typed. Arguments: the folder with node_modules, and JSON with the port, the address that
// it leads back to, that after signing out, and the claims of each login.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [folder, text] = process.argv.slice(2);
const { port, back, out, people } = JSON.parse(text);
const found = createRequire(`${folder}/`).resolve('oidc-provider');
const { Provider } = await import(pathToFileURL(found));

const provider = new Provider(`http://localhost:${port}`, {
  clients: [{
    client_id: 'loraplex',
    client_secret: 'a-secret-of-the-tests',
    redirect_uris: [back],
    post_logout_redirect_uris: [out],
  }],
  claims: { openid: ['sub'], email: ['email', 'email_verified'], profile: ['name', 'groups', 'customer'] },
  findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id, ...people[id] }) }),
  cookies: { keys: ['for-the-tests'] },
  pkce: { required: () => true },
});
provider.listen(port, '127.0.0.1', () => console.log('ready'));
process.stdin.resume();
process.stdin.on('end', () => process.exit(0));
