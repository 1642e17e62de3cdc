package marwright;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/** What the system properties say, read once; server/frontend.py writes them. */
final class Settings {
    static final Logger LOG = LoggerFactory.getLogger("marwright.requests");
    static final String[] DENY =
            Arrays.stream(System.getProperty("marwright.deny", "/workflows,/wfpredict").split(","))
                    .map(part -> "/" + part.strip().replaceAll("^/+|/+$", ""))
                    .filter(part -> part.length() > 1)
                    .toArray(String[]::new);
    /** From a request's first byte to its last; 0 for no limit. */
    static final long REQUEST_MILLIS = (long) (1000 * readNumber("marwright.request.seconds", 0));
    static final long MAX_CONNECTIONS = (long) readNumber("marwright.max.connections", Long.MAX_VALUE);
    static final String RETRY_AFTER = System.getProperty("marwright.retry.after", "1");
    static final String LOG_REQUESTS = System.getProperty("marwright.log.requests", "errors");
    static final String KEY_FILE = System.getProperty("marwright.key.file");
    static final String GATEWAY_KEY_FILE = System.getProperty("marwright.gateway.key.file");

    private Settings() {}

    /** What opens the management API for changes; read when the first one is asked for. */
    static final class Key {
        static final byte[] VALUE =
                readKey(KEY_FILE, "no model can be changed: the key file cannot be read");
    }

    /** Return a file's text; nothing, which no request has for a key, where it cannot be read. */
    static byte[] readKey(String file, String otherwise) {
        try {
            String text = Files.readString(Path.of(file), StandardCharsets.UTF_8);
            return text.strip().getBytes(StandardCharsets.UTF_8);
        } catch (IOException | RuntimeException exc) {
            LOG.error("{}: {}", otherwise, exc.toString());
            return new byte[0];
        }
    }

    private static double readNumber(String name, double otherwise) {
        String text = System.getProperty(name);
        try {
            return text == null ? otherwise : Double.parseDouble(text);
        } catch (NumberFormatException exc) {
            LOG.error("{} is no number: {}", name, text);
            return otherwise;
        }
    }
}
