// server.c: EVAL, EVALSHA, FUNCTION LOAD and FCALL: replies become Lua's values and values replies by Redis' rules.
#include "server.h"

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

struct server {
    struct store *store;
    lua_State *lua;
    const struct patch *patch;
    char sha1[41];     // of the script that is known; "": none
    int script;        // its place in Lua's registry
    bool functions;    // are known here
    char function[64]; // the name of the one that was loaded; "": none
    int callback;      // its place in Lua's registry
};

enum { CALL_MAX = 1024 }; // arguments of one command

// ---- values to Lua

static const char *push_reply(lua_State *l, const char *at);

static const char *push_array(lua_State *l, const char *at, long n)
{
    if (n < 0) {
        lua_pushboolean(l, 0);
        return at;
    }
    luaL_checkstack(l, 4, "a reply is too deep");
    lua_createtable(l, (int)n, 0);
    for (long i = 1; i <= n; i++) {
        at = push_reply(l, at);
        lua_rawseti(l, -2, (int)i);
    }
    return at;
}

static void push_named(lua_State *l, const char *name, const char *text, size_t length)
{
    lua_createtable(l, 0, 1);
    lua_pushlstring(l, text, length);
    lua_setfield(l, -2, name);
}

// One reply of our own making; returns what follows it.
static const char *push_reply(lua_State *l, const char *at)
{
    const char *line = at + 1, *end = memchr(line, '\r', 1024), *next = end + 2;
    long n = strtol(line, NULL, 10);
    if (*at == '*')
        return push_array(l, next, n);
    if (*at == ':')
        lua_pushnumber(l, (lua_Number)strtoll(line, NULL, 10));
    else if (*at == '+' || *at == '-')
        push_named(l, *at == '+' ? "ok" : "err", line, (size_t)(end - line));
    else if (n < 0)
        lua_pushboolean(l, 0);
    else {
        lua_pushlstring(l, next, (size_t)n);
        next += n + 2;
    }
    return next;
}

// ---- values from Lua

static void add_head(struct buffer *out, char kind, long long n)
{
    char text[32];
    buffer_add(out, text, (size_t)snprintf(text, sizeof text, "%c%lld\r\n", kind, n));
}

// The table at the top has a field of this name, which goes to the reply as a line.
static bool add_named(lua_State *l, const char *name, char kind, struct buffer *out)
{
    lua_getfield(l, -1, name);
    size_t length;
    const char *text = lua_type(l, -1) == LUA_TSTRING ? lua_tolstring(l, -1, &length) : NULL;
    if (text) {
        buffer_add(out, &kind, 1);
        for (size_t i = 0; i < length; i++)
            buffer_add(out, text[i] == '\r' || text[i] == '\n' ? " " : text + i, 1);
        buffer_add(out, "\r\n", 2);
    }
    lua_pop(l, 1);
    return text != NULL;
}

static void add_value(lua_State *l, struct buffer *out); // the one at the top, which it takes away

static void add_table(lua_State *l, struct buffer *out)
{
    int n = 0;
    if (add_named(l, "err", '-', out) || add_named(l, "ok", '+', out))
        return;
    luaL_checkstack(l, 4, "an answer is too deep");
    for (bool more = true; more; n += more) { // until the first nil
        lua_rawgeti(l, -1, n + 1);
        more = !lua_isnil(l, -1);
        lua_pop(l, 1);
    }
    add_head(out, '*', n);
    for (int i = 1; i <= n; i++) {
        lua_rawgeti(l, -1, i);
        add_value(l, out);
    }
}

static void add_value(lua_State *l, struct buffer *out)
{
    struct text text;
    switch (lua_type(l, -1)) {
    case LUA_TSTRING:
        text.bytes = lua_tolstring(l, -1, &text.length);
        reply_bulk(out, text);
        break;
    case LUA_TNUMBER:
        add_head(out, ':', (long long)lua_tonumber(l, -1));
        break;
    case LUA_TTABLE:
        add_table(l, out);
        break;
    default:
        if (lua_toboolean(l, -1))
            add_head(out, ':', 1);
        else
            add_head(out, '$', -1);
    }
    lua_pop(l, 1);
}

// ---- what scripts call

static struct server *self(lua_State *l)
{
    return lua_touserdata(l, lua_upvalueindex(1));
}

// The reply is left on the stack; true: it is an error.
static bool call(lua_State *l)
{
    struct text argv[CALL_MAX];
    struct buffer out = {0};
    int argc = lua_gettop(l);
    char numbers[64][32];
    int n_numbers = 0;
    if (argc < 1 || argc > CALL_MAX)
        return luaL_error(l, "redis.call of %d arguments", argc);
    for (int i = 0; i < argc; i++) {
        if (lua_type(l, i + 1) == LUA_TNUMBER && n_numbers < 64) {
            char *text = numbers[n_numbers++];
            snprintf(text, sizeof numbers[0], "%.17g", lua_tonumber(l, i + 1));
            argv[i] = text_of(text);
        } else if (lua_type(l, i + 1) == LUA_TSTRING) {
            argv[i].bytes = lua_tolstring(l, i + 1, &argv[i].length);
        } else
            return luaL_error(l, "Lua redis lib command arguments must be strings or integers");
    }
    store_run(self(l)->store, (size_t)argc, argv, &out);
    bool error = *out.bytes == '-';
    push_reply(l, out.bytes);
    buffer_free(&out);
    return error;
}

static int redis_call(lua_State *l)
{
    return call(l) ? lua_error(l) : 1;
}

static int redis_pcall(lua_State *l)
{
    call(l);
    return 1;
}

static void hex(const void *bytes, size_t length, char out[41])
{
    unsigned char digest[SHA_DIGEST_LENGTH];
    SHA1(bytes, length, digest);
    for (size_t i = 0; i < sizeof digest; i++)
        snprintf(out + 2 * i, 3, "%02x", digest[i]);
}

static int redis_sha1hex(lua_State *l)
{
    size_t length;
    char sha1[41];
    const char *bytes = luaL_checklstring(l, 1, &length);
    hex(bytes, length, sha1);
    lua_pushstring(l, sha1);
    return 1;
}

static int redis_error_reply(lua_State *l)
{
    size_t length;
    const char *text = luaL_checklstring(l, 1, &length);
    push_named(l, "err", text, length);
    return 1;
}

static int struct_pack(lua_State *l)
{
    double x = luaL_checknumber(l, 2);
    if (strcmp(luaL_checkstring(l, 1), "<d") != 0)
        return luaL_error(l, "struct.pack: the model knows only <d");
    lua_pushlstring(l, (const char *)&x, sizeof x);
    return 1;
}

// ---- the server

static void add_library(struct server *s, const char *name, const luaL_Reg *functions)
{
    lua_newtable(s->lua);
    for (; functions->name; functions++) {
        lua_pushlightuserdata(s->lua, s);
        lua_pushcclosure(s->lua, functions->func, 1);
        lua_setfield(s->lua, -2, functions->name);
    }
    lua_setglobal(s->lua, name);
}

static void open_lua(struct server *s)
{
    static const luaL_Reg redis[] = {{"call", redis_call},
                                     {"pcall", redis_pcall},
                                     {"sha1hex", redis_sha1hex},
                                     {"error_reply", redis_error_reply},
                                     {NULL, NULL}},
                          pack[] = {{"pack", struct_pack}, {NULL, NULL}},
                          standard[] = {{"", luaopen_base},
                                        {LUA_TABLIBNAME, luaopen_table},
                                        {LUA_STRLIBNAME, luaopen_string},
                                        {LUA_MATHLIBNAME, luaopen_math}};
    s->lua = luaL_newstate();
    lua_gc(s->lua, LUA_GCSETPAUSE, 1000); // a run leaves little behind, and a collection looks at all that stays
    for (size_t i = 0; i < sizeof standard / sizeof *standard; i++) {
        lua_pushcfunction(s->lua, standard[i].func);
        lua_pushstring(s->lua, standard[i].name);
        lua_call(s->lua, 1, 0);
    }
    add_library(s, "redis", redis);
    add_library(s, "struct", pack);
    if (luaL_dostring(s->lua, "KEYS, ARGV = {}, {}\n"
                              "local function refuse(_, name) error('global variable ' .. tostring(name), 2) end\n"
                              "setmetatable(_G, { __newindex = refuse, __index = refuse })"))
        abort();
}

struct server *server_new(const struct patch *patch, bool functions)
{
    struct server *s = sim_alloc(sizeof *s);
    s->functions = functions;
    s->store = store_new();
    s->patch = patch;
    open_lua(s);
    return s;
}

void server_free(struct server *s)
{
    lua_close(s->lua);
    store_free(s->store);
    free(s);
}

struct store *server_store(struct server *s)
{
    return s->store;
}

void server_forget_functions(struct server *s)
{
    if (*s->function)
        luaL_unref(s->lua, LUA_REGISTRYINDEX, s->callback);
    s->function[0] = '\0';
}

void server_forget_scripts(struct server *s)
{
    if (*s->sha1)
        luaL_unref(s->lua, LUA_REGISTRYINDEX, s->script);
    *s->sha1 = 0;
}

char *patch_apply(struct text script, const struct patch *patch, size_t *length)
{
    size_t from = patch ? strlen(patch->from) : 0, to = patch ? strlen(patch->to) : 0;
    const char *at = patch ? memmem(script.bytes, script.length, patch->from, from) : script.bytes;
    size_t before = at ? (size_t)(at - script.bytes) : 0, after = script.length - before - from;
    if (!at || (patch && memmem(at + 1, script.length - before - 1, patch->from, from)))
        return NULL;
    char *text = sim_alloc(script.length - from + to + 1);
    memcpy(text, script.bytes, before);
    memcpy(text + before, patch ? patch->to : "", to);
    memcpy(text + before + to, at + from, after);
    *length = before + to + after;
    return text;
}

static bool load_script(struct server *s, struct text script, struct buffer *out)
{
    char sha1[41];
    hex(script.bytes, script.length, sha1);
    if (strcmp(sha1, s->sha1) == 0)
        return true;
    size_t length;
    char *text = patch_apply(script, s->patch, &length);
    server_forget_scripts(s);
    if (!text || luaL_loadbuffer(s->lua, text, length, "@script") != 0) {
        reply_error(out, "ERR Error compiling script: %s", text ? lua_tostring(s->lua, -1) : "the patch does not fit");
        free(text);
        return false;
    }
    free(text);
    s->script = luaL_ref(s->lua, LUA_REGISTRYINDEX);
    memcpy(s->sha1, sha1, sizeof sha1);
    return true;
}

// redis.register_function{function_name =, callback =, flags =}, while a library is made.
static int on_register(lua_State *l)
{
    struct server *s = lua_touserdata(l, lua_upvalueindex(1));
    lua_getfield(l, 1, "function_name");
    snprintf(s->function, sizeof s->function, "%s", luaL_checkstring(l, -1));
    lua_getfield(l, 1, "callback");
    s->callback = luaL_ref(l, LUA_REGISTRYINDEX);
    return 0;
}

static void set_register(struct server *s, bool there)
{
    lua_getglobal(s->lua, "redis");
    if (there) {
        lua_pushlightuserdata(s->lua, s);
        lua_pushcclosure(s->lua, on_register, 1);
    } else {
        lua_pushnil(s->lua);
    }
    lua_setfield(s->lua, -2, "register_function");
    lua_pop(s->lua, 1);
}

// FUNCTION LOAD REPLACE text, whose first line is no Lua.
static void load_function(struct server *s, struct text library, struct buffer *out)
{
    size_t length;
    const char *line = memchr(library.bytes, '\n', library.length);
    const size_t skip = line ? (size_t)(line - library.bytes) + 1 : library.length;
    char *text = patch_apply((struct text){library.bytes + skip, library.length - skip}, s->patch, &length);
    server_forget_functions(s);
    set_register(s, true);
    if (!text || luaL_loadbuffer(s->lua, text, length, "@function") != 0 || lua_pcall(s->lua, 0, 0, 0) != 0)
        reply_error(out, "ERR Error registering functions: %s",
                    text ? lua_tostring(s->lua, -1) : "the patch does not fit");
    else
        reply_bulk(out, text_of("loaded"));
    set_register(s, false);
    lua_settop(s->lua, 0);
    free(text);
}

static void push_list(lua_State *l, size_t n, const struct text *texts)
{
    lua_createtable(l, (int)n, 0);
    for (size_t i = 0; i < n; i++) {
        lua_pushlstring(l, texts[i].bytes, texts[i].length);
        lua_rawseti(l, -2, (int)i + 1);
    }
}

static void set_list(lua_State *l, const char *name, size_t n, const struct text *texts)
{
    push_list(l, n, texts);
    lua_pushstring(l, name);
    lua_insert(l, -2);
    lua_rawset(l, LUA_GLOBALSINDEX);
}

// EVAL script numkeys key... arg..., or FCALL function ...
static void eval(struct server *s, bool function, size_t argc, const struct text *argv, struct buffer *out)
{
    lua_State *l = s->lua;
    size_t n_keys = argc > 2 ? strtoul(argv[2].bytes, NULL, 10) : argc;
    if (n_keys + 3 > argc) {
        reply_error(out, "ERR Number of keys can't be greater than number of args");
        return;
    }
    if (function) {
        lua_rawgeti(l, LUA_REGISTRYINDEX, s->callback);
        push_list(l, n_keys, argv + 3);
        push_list(l, argc - 3 - n_keys, argv + 3 + n_keys);
    } else {
        set_list(l, "KEYS", n_keys, argv + 3);
        set_list(l, "ARGV", argc - 3 - n_keys, argv + 3 + n_keys);
        lua_rawgeti(l, LUA_REGISTRYINDEX, s->script);
    }
    if (lua_pcall(l, function ? 2 : 0, 1, 0) == 0) {
        add_value(l, out);
        return;
    }
    bool refused = lua_istable(l, -1); // by redis.call, whose word comes first
    if (refused)
        lua_getfield(l, -1, "err");
    const char *why = lua_tostring(l, -1);
    reply_error(out, "%s%s script", refused ? "" : "ERR ", why ? why : "?");
    lua_settop(l, 0);
}

static bool is_command(struct text name, const char *command, bool *read_only)
{
    size_t length = strlen(command);
    *read_only = name.length == length + 3 && strncasecmp(name.bytes + length, "_RO", 3) == 0;
    return (name.length == length || *read_only) && strncasecmp(name.bytes, command, length) == 0;
}

void server_run(struct server *s, size_t argc, const struct text *argv, struct buffer *out)
{
    bool read_only, known = is_command(argv[0], "EVALSHA", &read_only);
    const size_t dirty = store_dirty(s->store);
    if (known && (argc < 2 || !text_is(argv[1], s->sha1)))
        reply_error(out, "NOSCRIPT No matching script. Please use EVAL.");
    else if (known || (argc > 1 && is_command(argv[0], "EVAL", &read_only))) {
        if (known || load_script(s, argv[1], out))
            eval(s, false, argc, argv, out);
        if (read_only && store_dirty(s->store) > dirty) { // as far as here, what it wrote is not undone
            out->length = 0;
            reply_error(out, "ERR Write commands are not allowed from read-only scripts.");
        }
    } else if (s->functions && argc == 4 && text_is(argv[0], "FUNCTION"))
        load_function(s, argv[3], out);
    else if (s->functions && argc > 2 && text_is(argv[0], "FCALL") && !text_is(argv[1], s->function))
        reply_error(out, "ERR Function not found");
    else if (s->functions && argc > 2 && text_is(argv[0], "FCALL"))
        eval(s, true, argc, argv, out);
    else if (text_is(argv[0], "FUNCTION") || text_is(argv[0], "FCALL"))
        reply_error(out, "ERR unknown command '%.*s', with args beginning with: ", (int)argv[0].length, argv[0].bytes);
    else if (text_is(argv[0], "INFO")) // what queue_open looks at
        reply_bulk(out, text_of("redis_version:7.0.15\r\nmaxmemory_policy:noeviction\r\n"));
    else
        store_run(s->store, argc, argv, out);
}
