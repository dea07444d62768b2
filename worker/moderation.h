// moderation.h: the admission hook: whether prompts are within the fleet's policy, by a deny list, an HTTP endpoint, or
// both ([moderation] in the configuration; PROTOCOL.md says what the endpoint is asked and answers).
//
// Nothing here waits: an endpoint is asked about several jobs at once, and a job whose answer is still to come stays in
// its door. Used by one thread at a time. No prompt is in a log, an error or a reason.
#ifndef DITFLEET_MODERATION_H
#define DITFLEET_MODERATION_H

#include "proto/conf.h"
#include "proto/log.h"
#include "proto/queue.h"

struct moderation;

// Copies what it needs of conf and log. *out is NULL where conf asks for none. Errors name the file and line, or the
// URL without its query.
int moderation_new(const struct conf *conf, const struct log *log, struct moderation **out, struct err *err);
void moderation_free(struct moderation *m); // NULL is fine

// The judge of a struct queue_admission, whose judge_arg is the moderation.
queue_judge moderation_judge;

// Takes what the endpoint has answered; waits up to ms for it to answer at least one.
void moderation_wait(struct moderation *m, int ms);

#endif
