// target.h: where a job may send its pictures, and its callback. A URL comes from a stranger, and the process that
// follows it stands inside the fleet's network: so the address itself is judged, after name resolution and before
// connect, and every address that is not plainly public is refused unless the configuration names that host and port.
#ifndef DITFLEET_OUTPUT_TARGET_H
#define DITFLEET_OUTPUT_TARGET_H

#include "proto/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sockaddr;

// The node's configuration; strings are borrowed and outlive every user of the policy.
struct upload_policy {
    const char *const *allow_hosts; // (n_allow_hosts) "host:port" or "[v6]:port" that may be private or loopback
    size_t n_allow_hosts;
    const char *const *file_roots; // (n_file_roots) absolute directories that file targets may write below
    size_t n_file_roots;
    const char *what; // whose URLs, in errors: "callback"; NULL: "upload"
};

// A copy of n host:port entries becomes policy's list; ERR_NO_MEMORY. target_free_hosts frees it, also after an error.
int target_copy_hosts(struct upload_policy *policy, const char *const *hosts, size_t n, struct err *e);
void target_free_hosts(struct upload_policy *policy);

// Each allow entry has a host and a port, each root is absolute. ERR_INVALID names the entry.
int target_check_policy(const struct upload_policy *policy, struct err *e);

// A URL, its placeholders expanded, before any connection: http or https, printable ASCII, a host, no user or password;
// an address written out, in whatever spelling, is judged here already. ERR_INVALID or ERR_REFUSED. *allow_private (may
// be NULL) says whether the configuration names this host and port.
int target_check_url(const struct upload_policy *policy, const char *url, bool *allow_private, struct err *e);

// Only globally routable unicast is public: the special-purpose registries of IANA (RFC 6890) are not, nor are the IPv6
// ranges that carry an IPv4 address inside (mapped, NAT64, 6to4, Teredo).
bool target_address_public(const struct sockaddr *address);

// A file target: absolute, below one of the roots, no ".", ".." or empty component. Gives the root and the rest of the
// path, both borrowed. ERR_REFUSED. Symbolic links are met when the file is written (save.h).
int target_check_file(const struct upload_policy *policy, const char *path, const char **root, const char **rest,
                      struct err *e);

// Replaces {id} (percent-escaped but for letters, digits and "-._~"), {attempt} and {index}. Any other brace is
// ERR_INVALID. *out is malloc'ed; the caller frees it.
int target_expand(const char *template, const char *id, uint32_t attempt, uint32_t index, char **out, struct err *e);

// scheme://host:port/path, all that a log, an error or a result may show of a URL: no query, fragment, user or
// password. What does not parse gives "(malformed URL)". Cut to room bytes with the NUL.
void target_redact(const char *url, char *out, size_t room);

#endif
