/* Bare AMQP command round trips with librabbitmq: what the broker itself allows, with next to no client.
 *
 * The same two sides as bench/bare_pika.py, and spoken to in the same way:
 *
 *   amqp_floor devices HOST PORT AUTHORITY USER VHOST PREFIX FIRST COUNT
 *     COUNT connections over TLS, each consuming PREFIX.n: acks, and answers at `reply_to`. Says "ready", and ends when
 *     standard input is closed.
 *
 *   amqp_floor load HOST PORT USER VHOST PREFIX COUNT IN_FLIGHT
 *     For each line with a number of seconds: that long, keeps IN_FLIGHT persistent and confirmed messages on their way
 *     to COUNT queues in turn. A line back: round trips, seconds, p50 and p99 in milliseconds.
 *
 * The password is in BENCH_PASSWORD.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>

#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_ssl_socket.h>
#include <amqp_tcp_socket.h>

#define CHANNEL 1
#define RING 65536 /* more than may be in flight */
#define MOST 4000000 /* round trips of one line */

static const char *REPLY_TO = "amq.rabbitmq.reply-to";

static void fail(const char *what) {
  fprintf(stderr, "amqp_floor: %s\n", what);
  exit(1);
}

static void expect(amqp_connection_state_t connection, const char *what) {
  if (amqp_get_rpc_reply(connection).reply_type != AMQP_RESPONSE_NORMAL) fail(what);
}

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec + at.tv_nsec / 1e9;
}

static amqp_connection_state_t open_connection(const char *host, int port, const char *authority, const char *user,
                                               const char *vhost) {
  const char *password = getenv("BENCH_PASSWORD");
  amqp_connection_state_t connection = amqp_new_connection();
  amqp_socket_t *socket;
  if (password == NULL) fail("BENCH_PASSWORD is not set");
  if (authority != NULL) {
    socket = amqp_ssl_socket_new(connection);
    if (socket == NULL || amqp_ssl_socket_set_cacert(socket, authority) != AMQP_STATUS_OK) fail("no TLS");
    amqp_ssl_socket_set_verify_peer(socket, 1);
    amqp_ssl_socket_set_verify_hostname(socket, 1);
  } else {
    socket = amqp_tcp_socket_new(connection);
  }
  if (amqp_socket_open(socket, host, port) != AMQP_STATUS_OK) fail("can't connect");
  if (amqp_login(connection, vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, user, password).reply_type !=
      AMQP_RESPONSE_NORMAL)
    fail("can't log in");
  amqp_channel_open(connection, CHANNEL);
  expect(connection, "no channel");
  return connection;
}

/* ---- devices ---- */

static void answer(amqp_connection_state_t connection) {
  struct timeval none = {0, 0};
  for (;;) {
    amqp_envelope_t envelope;
    amqp_basic_properties_t properties;
    amqp_rpc_reply_t reply;
    amqp_maybe_release_buffers(connection);
    reply = amqp_consume_message(connection, &envelope, &none, 0);
    if (reply.reply_type != AMQP_RESPONSE_NORMAL) {
      if (reply.reply_type == AMQP_RESPONSE_LIBRARY_EXCEPTION && reply.library_error == AMQP_STATUS_TIMEOUT) return;
      fail("a device lost its connection");
    }
    properties._flags = AMQP_BASIC_CORRELATION_ID_FLAG;
    properties.correlation_id = envelope.message.properties.correlation_id;
    if (amqp_basic_ack(connection, CHANNEL, envelope.delivery_tag, 0) != AMQP_STATUS_OK ||
        amqp_basic_publish(connection, CHANNEL, amqp_empty_bytes, envelope.message.properties.reply_to, 0, 0,
                           &properties, envelope.message.body) != AMQP_STATUS_OK)
      fail("a device can't answer");
    amqp_destroy_envelope(&envelope);
  }
}

static int devices(char **arguments) {
  const char *host = arguments[0], *authority = arguments[2], *user = arguments[3], *vhost = arguments[4];
  const char *prefix = arguments[5];
  int port = atoi(arguments[1]), first = atoi(arguments[6]), count = atoi(arguments[7]);
  amqp_connection_state_t *connections = calloc(count, sizeof *connections);
  struct pollfd *polled = calloc(count + 1, sizeof *polled);
  for (int number = 0; number < count; number++) {
    char queue[256];
    snprintf(queue, sizeof queue, "%s.%d", prefix, first + number);
    connections[number] = open_connection(host, port, authority, user, vhost);
    amqp_basic_qos(connections[number], CHANNEL, 0, 3, 0);
    amqp_basic_consume(connections[number], CHANNEL, amqp_cstring_bytes(queue), amqp_empty_bytes, 0, 0, 0,
                       amqp_empty_table);
    expect(connections[number], "can't consume");
    polled[number].fd = amqp_get_sockfd(connections[number]);
    polled[number].events = POLLIN;
  }
  polled[count].fd = 0;
  polled[count].events = POLLIN;
  printf("ready\n");
  fflush(stdout);
  for (int number = 0; number < count; number++) answer(connections[number]);
  for (;;) {
    if (poll(polled, count + 1, -1) < 0) fail("poll");
    if (polled[count].revents != 0) return 0;
    for (int number = 0; number < count; number++)
      if (polled[number].revents != 0) answer(connections[number]);
  }
}

/* ---- load ---- */

enum { CONFIRMED = 1, ANSWERED = 2 };
static struct {
  double began;
  int seen;
} ring[RING];
static unsigned long sent, confirmed /* all up to this one */, done;
static float *taken; /* milliseconds */

static void publish(amqp_connection_state_t connection, const char *prefix, int count) {
  char queue[256], id[32];
  amqp_basic_properties_t properties;
  unsigned long tag = ++sent;
  snprintf(queue, sizeof queue, "%s.%lu", prefix, tag % count);
  snprintf(id, sizeof id, "%lu", tag);
  properties._flags = AMQP_BASIC_REPLY_TO_FLAG | AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_CONTENT_TYPE_FLAG |
                      AMQP_BASIC_CORRELATION_ID_FLAG;
  properties.reply_to = amqp_cstring_bytes(REPLY_TO);
  properties.delivery_mode = 2;
  properties.content_type = amqp_cstring_bytes("application/json");
  properties.correlation_id = amqp_cstring_bytes(id);
  ring[tag % RING].began = now();
  ring[tag % RING].seen = 0;
  if (amqp_basic_publish(connection, CHANNEL, amqp_empty_bytes, amqp_cstring_bytes(queue), 1, 0, &properties,
                         amqp_cstring_bytes("{}")) != AMQP_STATUS_OK)
    fail("can't publish");
}

/* Whether that completes a round trip. */
static int arrived(unsigned long tag, int what) {
  if (ring[tag % RING].seen & what) return 0;
  ring[tag % RING].seen |= what;
  if (ring[tag % RING].seen != (CONFIRMED | ANSWERED)) return 0;
  if (done < MOST) taken[done] = (float)((now() - ring[tag % RING].began) * 1000);
  done++;
  return 1;
}

/* Takes one frame in; how many round trips it completes. */
static int take(amqp_connection_state_t connection) {
  struct timeval patience = {10, 0};
  amqp_frame_t frame;
  int completed = 0;
  amqp_maybe_release_buffers(connection);
  if (amqp_simple_wait_frame_noblock(connection, &frame, &patience) != AMQP_STATUS_OK) fail("nothing comes back");
  if (frame.frame_type != AMQP_FRAME_METHOD) return 0;
  if (frame.payload.method.id == AMQP_BASIC_ACK_METHOD) {
    amqp_basic_ack_t *ack = frame.payload.method.decoded;
    unsigned long last = ack->delivery_tag;
    for (unsigned long tag = ack->multiple ? confirmed + 1 : last; tag <= last; tag++) completed += arrived(tag, CONFIRMED);
    while (confirmed < sent && ring[(confirmed + 1) % RING].seen & CONFIRMED) confirmed++;
  } else if (frame.payload.method.id == AMQP_BASIC_DELIVER_METHOD) {
    amqp_message_t message;
    char id[32] = {0};
    if (amqp_read_message(connection, CHANNEL, &message, 0).reply_type != AMQP_RESPONSE_NORMAL) fail("no message");
    if (message.properties.correlation_id.len >= sizeof id) fail("an answer to something else");
    memcpy(id, message.properties.correlation_id.bytes, message.properties.correlation_id.len);
    completed += arrived(strtoul(id, NULL, 10), ANSWERED);
    amqp_destroy_message(&message);
  } else {
    fail("a message was returned or refused");
  }
  return completed;
}

static int ascending(const void *one, const void *other) {
  float a = *(const float *)one, b = *(const float *)other;
  return (a > b) - (a < b);
}

static int load(char **arguments) {
  const char *host = arguments[0], *user = arguments[2], *vhost = arguments[3], *prefix = arguments[4];
  int port = atoi(arguments[1]), count = atoi(arguments[5]), in_flight = atoi(arguments[6]);
  amqp_connection_state_t connection = open_connection(host, port, NULL, user, vhost);
  char line[64];
  taken = malloc(MOST * sizeof *taken);
  if (taken == NULL || in_flight >= RING) fail("too much in flight");
  amqp_confirm_select(connection, CHANNEL);
  expect(connection, "no confirms");
  amqp_basic_consume(connection, CHANNEL, amqp_cstring_bytes(REPLY_TO), amqp_empty_bytes, 0, 1, 0, amqp_empty_table);
  expect(connection, "no direct reply-to");
  while (fgets(line, sizeof line, stdin) != NULL) {
    double began = now(), until = began + atof(line);
    unsigned long open = 0, kept;
    done = 0;
    for (; open < (unsigned long)in_flight; open++) publish(connection, prefix, count);
    while (open > 0) {
      for (int more = take(connection); more > 0; more--) {
        open--;
        if (now() < until) {
          publish(connection, prefix, count);
          open++;
        }
      }
    }
    double seconds = now() - began;
    kept = done < MOST ? done : MOST;
    qsort(taken, kept, sizeof *taken, ascending);
    printf("%lu %.6f %.4f %.4f\n", done, seconds, taken[kept / 2], taken[(unsigned long)(kept * 0.99)]);
    fflush(stdout);
  }
  return 0;
}

int main(int count, char **arguments) {
  if (count == 10 && strcmp(arguments[1], "devices") == 0) return devices(arguments + 2);
  if (count == 9 && strcmp(arguments[1], "load") == 0) return load(arguments + 2);
  fprintf(stderr, "usage: see the head of amqp_floor.c\n");
  return 2;
}
