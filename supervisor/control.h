// control.h: the control socket, a Unix stream socket on which one JSON object in a line is answered by another.
//
//   {"cmd":"status"}                      the whole node: groups, ranks, Redis, releases
//   {"cmd":"drain"}  {"cmd":"resume"}     every group, or with "group":"NAME" one of them
//
// The answer holds "ok":true, or "ok":false and "error". One request a connection; mode 0600 is the access control.
#ifndef DITFLEET_SUPERVISOR_CONTROL_H
#define DITFLEET_SUPERVISOR_CONTROL_H

#include <jansson.h>
#include <systemd/sd-event.h>

#include "proto/conf.h"

enum { CONTROL_PATH_BYTES = 108 }; // of sockaddr_un
// STATE_DIR/control.sock. Returns out.
const char *control_path(const struct conf *conf, char out[CONTROL_PATH_BYTES]);

// ---- the supervisor's side

struct control;
// Answers request, an object; the returned object is taken over. NULL: out of memory.
typedef json_t *control_handler(void *arg, const json_t *request);

// Replaces what lies at path; the caller holds the lock of the directory.
int control_open(sd_event *event, const char *path, control_handler *handler, void *arg, struct control **out,
                 struct err *err);
void control_close(struct control *c);

// ---- everybody else's side

// Sends request (one JSON object, no newline) and waits up to 5 s. *reply is the caller's (json_decref), also when it
// says "ok":false, which gives ERR_REFUSED with its "error". ERR_UNAVAILABLE: no supervisor there. ERR_TIMEOUT,
// ERR_CORRUPT.
int control_request(const char *path, const char *request, json_t **reply, struct err *err);

#endif
