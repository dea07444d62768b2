// spot.h: the cloud's word that it is about to take this machine back, asked for every 5 s on a thread of its own.
//
// Where to ask is [node] spot_notice: "ec2", "gce" or "azure", each with "@http://host:port" behind it to ask there
// instead; any http(s) URL, where 200 is the notice and 404 or 204 is none; or the path of a file, whose being there is
// the notice. Only the hosts so named are asked; redirects are not followed, no proxy is asked.
#ifndef DITFLEET_SUPERVISOR_SPOT_H
#define DITFLEET_SUPERVISOR_SPOT_H

#include <stdbool.h>

#include "proto/err.h"
#include "proto/log.h"

struct spot;

// source as above, checked by conf.c. Copies what it needs. ERR_NO_MEMORY.
int spot_start(const char *source, const struct log *log, struct spot **out, struct err *err);
void spot_stop(struct spot *s); // within about a second; NULL is fine

// Readable (an eventfd) once there is a notice, which is not taken back.
int spot_fd(const struct spot *s);

#endif
