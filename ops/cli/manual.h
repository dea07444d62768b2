// manual.h: what --help prints: text, a manual page, or words for the shell's completion, all from the tables of flags
// and of the job's fields, and the prose of each command that stands here alone.
#ifndef DITFLEET_CLI_MANUAL_H
#define DITFLEET_CLI_MANUAL_H

#include "ops/cli/cli.h"

enum manual_form { MANUAL_TEXT, MANUAL_PAGE, MANUAL_WORDS };

// Whether arg asks for help, and in which form: --help or -h, --help=man (roff), --help=words (a line for each verb and
// flag: its name, then what may follow it).
bool manual_asked(const char *arg, enum manual_form *form);

// Of one command, whose job may be set by flags, on stdout.
void manual_command(enum manual_form form, const struct cli_command *self, const struct cli_flag *flags, int n_flags,
                    bool job);
// The page ditfleet.conf(5), on stdout.
void manual_configuration(void);
// Of the program, whose commands end with NULL.
void manual_program(FILE *to, enum manual_form form, const struct cli_command *const *commands);

#endif
