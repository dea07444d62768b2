// callback_message.h: what a callback says, how it is signed (Standard Webhooks), and when it is tried again. Nothing
// here touches the network or Redis.
//
// A message tells of the outcome and where the pictures lie; never prompts, headers or the queries of URLs.
#ifndef DITFLEET_SUPERVISOR_CALLBACK_MESSAGE_H
#define DITFLEET_SUPERVISOR_CALLBACK_MESSAGE_H

#include "proto/queue.h"

enum {
    CALLBACK_MAX_SECRETS = 8,
    CALLBACK_SECRET_LEAST = 24, // bytes, as the specification has it
    CALLBACK_SECRET_MOST = 64,
    CALLBACK_SIGNATURE_SIZE = 48 * CALLBACK_MAX_SECRETS + 1, // each "v1,", 44 characters of Base64, a space
};

// Secrets: wiped by callback_secrets_wipe.
struct callback_secrets {
    int count; // more than one while they are rotated: a message is signed with each
    struct {
        unsigned char bytes[CALLBACK_SECRET_MOST];
        size_t length;
    } key[CALLBACK_MAX_SECRETS];
};

// A regular file of the process's own user or of root, closed to others and written by its owner alone; see
// callback_secrets_parse. ERR_NOT_FOUND, ERR_IO, ERR_REFUSED (mode or owner), ERR_INVALID. No error repeats a secret.
int callback_secrets_load(const char *path, struct callback_secrets *out, struct err *err);
// One "whsec_<Base64>" a line, 24 to 64 bytes; empty lines and those that start with # are passed over. name stands for
// the file in errors.
int callback_secrets_parse(const char *text, const char *name, struct callback_secrets *out, struct err *err);
void callback_secrets_wipe(struct callback_secrets *secrets);

// The value of webhook-signature for this message, time (seconds since 1970) and body.
int callback_sign(const struct callback_secrets *secrets, const char *message, int64_t time, const char *body,
                  char out[CALLBACK_SIGNATURE_SIZE], struct err *err);

// The JSON of a final job, malloc. The same for each try.
int callback_body(const struct queue_callback *c, char **out, struct err *err);

// Seconds from the try of this number (1 is the first) to the next: min(most, least * 2^(try - 1)), of which the later
// half is left to random, in [0, 1); not sooner than the receiver asked for (0: it did not), within most.
double callback_wait(double least, double most, uint64_t tries, double asked_for, double random);

#endif
